"""A uniform random sample of images from a stream that is read once (a reservoir, Vitter 1985)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hgprompt.errors import StatisticsError


class ImageSample:
    """At most `capacity` images of a stream, each with the same probability, whatever its order or batch size.

    Args:
        capacity: None keeps all images.
        folds: the stream's image n belongs to fold n mod folds, as in EnsembleStatistics.
        seed: of the sample's own generator.
    """

    def __init__(self, capacity: int | None, folds: int, seed: int) -> None:
        self.capacity = capacity
        self.folds = folds
        self._generator = np.random.default_rng(seed)
        self._images: list[Tensor] = []
        self._features: list[Tensor] = []
        self._labels: list[int] = []
        self._positions: list[int] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._images)

    @property
    def nbytes(self) -> int:
        """Bytes of the images and features kept."""
        return sum(t.numel() * t.element_size() for t in (*self._images, *self._features))

    @property
    def features(self) -> list[Tensor]:
        """Features [M, h] of each image kept, place by place: what cannot be drawn from the stream again."""
        return self._features

    def update(self, images: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """Offer a batch: images [B, ...], labels [B], features [M, B, h]. What is kept is copied, on its device.

        Without features the images are drawn all the same; `restore` brings the features.
        """
        for i, label in enumerate(labels.tolist()):
            place = self._place(self._seen)
            if place is not None:
                of_image = torch.empty(0) if features is None else features[:, i].clone()
                self._put(place, images[i].clone(), label, of_image)
            self._seen += 1

    def restore(self, features: list[Tensor]) -> None:
        """Put back the `features` of a sample that has been offered the same stream."""
        if len(features) != len(self):
            raise StatisticsError(f"features of {len(features)} images for a sample of {len(self)}")
        self._features = list(features)

    def fold(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [n, ...], labels [n] and features [M, n, h] of fold k, in the order of the stream."""
        return self._select([i for i in self._in_order() if self._positions[i] % self.folds == k])

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """All images [n, ...], labels [n] and features [M, n, h], in the order of the stream."""
        return self._select(self._in_order())

    def _place(self, position: int) -> int | None:
        if self.capacity is None or position < self.capacity:
            return position
        place = int(self._generator.integers(position + 1))
        return place if place < self.capacity else None

    def _put(self, place: int, image: Tensor, label: int, features: Tensor) -> None:
        if place == len(self._images):
            self._images.append(image)
            self._features.append(features)
            self._labels.append(label)
            self._positions.append(self._seen)
        else:
            self._images[place], self._features[place] = image, features
            self._labels[place], self._positions[place] = label, self._seen

    def _in_order(self) -> list[int]:
        return sorted(range(len(self._positions)), key=self._positions.__getitem__)

    def _select(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.tensor([self._labels[i] for i in chosen], dtype=torch.int64)
        if not chosen:
            return torch.empty(0), labels, torch.empty(0)
        features = torch.stack([self._features[i] for i in chosen], dim=1)
        return torch.stack([self._images[i] for i in chosen]), labels, features
