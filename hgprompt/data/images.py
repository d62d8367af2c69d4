"""LabelledImages: decoded images in memory, ready for training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hgprompt.data.bad_images import Skipped
from hgprompt.errors import DataError


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """A labelled set of images of one size, in memory.

    Attributes:
        name: of the task. images: uint8 [N, 3, H, W]. labels: int64 [N], 0 … C-1.
        class_names: names of labels 0, 1, …; None where they are not known. skipped: what of it could not be read.

    Raises:
        DataError: shapes, dtypes or labels that do not fit together.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    skipped: Skipped | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images must be uint8 [N, 3, H, W], got {list(self.images.shape)} {self.images.dtype}")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 [{len(self.images)}], got {list(self.labels.shape)} {self.labels.dtype}"
            )
        if len(self.labels) and (int(self.labels.min()) < 0 or int(self.labels.max()) >= self.num_classes):
            raise DataError(
                f"labels of {self.name} run from {int(self.labels.min())} to {int(self.labels.max())}, "
                f"its classes from 0 to {self.num_classes - 1}"
            )

    @property
    def num_classes(self) -> int:
        """C: as many as have names, or one more than the largest label."""
        if self.class_names is not None:
            return len(self.class_names)
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """(image, label), or for a slice or a tensor of indices (images, labels)."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a DataLoader asks for: one gather for the batch."""
        images, labels = self[torch.as_tensor(indices, device="cpu")]
        return list(zip(images, labels, strict=True))

    def batches(self, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Views of `batch_size` images and labels, in order: a loader for `fast_ensemble`."""
        return [self[start : start + batch_size] for start in range(0, len(self), batch_size)]

    def subset(self, indices: Tensor) -> LabelledImages:
        """These images alone, in this order."""
        return LabelledImages(self.name, self.images[indices], self.labels[indices], self.class_names, self.skipped)
