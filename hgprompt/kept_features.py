"""The features of a stream as they came in: batch by batch, with their labels and folds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hgprompt.distributed import Ranks
from hgprompt.moments import Moments, add_by_fold


class KeptFeatures:
    """Features [M, b, h] of batches, in their dtype, on their device; labels [b] and folds [b] on the CPU.

    Args:
        batches: to begin with. Their tensors are shared, and never changed in place.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]] = ()) -> None:
        self.batches = list(batches)

    def __bool__(self) -> bool:
        return bool(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return iter(self.batches)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(part.numel() * part.element_size() for batch in self.batches for part in batch)

    def add(self, features: Tensor, labels: Tensor, fold_of: Tensor) -> None:
        """One more batch, which is not copied."""
        self.batches.append((features, labels, fold_of))

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Features [M, N, h], labels [N] and folds [N] of all batches, which become one."""
        if len(self.batches) > 1:
            features, labels, fold_of = zip(*self.batches, strict=True)
            self.batches = [(torch.cat(features, dim=1), torch.cat(labels), torch.cat(fold_of))]
        return self.batches[0]

    def moments(self, folds: int, select: Callable[[Tensor], Tensor] | None = None) -> list[Moments]:
        """Moments of the images of each fold, batch by batch; of what `select` makes of features [M, b, h]."""
        moments: list[Moments] = []
        for features, labels, fold_of in self.batches:
            selected = features if select is None else select(features)
            moments = moments or [Moments(len(selected), selected.shape[2]) for _ in range(folds)]
            add_by_fold(moments, selected, labels, fold_of)
        return moments

    def of_all(self, ranks: Ranks, shape: tuple[int, int], dtype: torch.dtype) -> KeptFeatures:
        """Features (M, h) of this dtype of all ranks, in rank order; a rank may have none."""
        if self.batches:
            features, labels, fold_of = self.joined()
        else:
            features = torch.zeros(shape[0], 0, shape[1], dtype=dtype, device="cpu")
            labels = torch.zeros(0, dtype=torch.int64, device="cpu")
            fold_of = torch.zeros(0, dtype=torch.int32, device="cpu")
        parts = ranks.gather(features, 1), ranks.gather(labels), ranks.gather(fold_of)
        return KeptFeatures(zip(*parts, strict=True))
