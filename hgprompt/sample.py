"""A uniform random sample of images from a stream that is read once, the same however the stream is shared out.

Every image draws a number from its place in the whole stream and a seed, and the images with the smallest numbers are
the sample (bottom-k sampling; Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches"). Ranks that each keep
their own smallest hold, together, those of the whole.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hgprompt.distributed import Ranks
from hgprompt.errors import StatisticsError


class ImageSample:
    """At most `capacity` images of a stream, each with the same probability, whatever its order or batch size.

    Args:
        capacity: None keeps all images.
        folds: groups of images, as in EnsembleStatistics (`folds_of`).
        seed: of the images' numbers.
        shard: (r, W): this stream is every W-th image of the whole one, from image r on.
    """

    def __init__(self, capacity: int | None, folds: int, seed: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.capacity = capacity
        self.folds = folds
        self.seed = seed
        self.shard = shard
        self._kept: list[_Kept] = []
        self._largest: list[tuple[int, int]] = []  # heap of (-number, place)
        self._limit: int | None = None
        self._seen = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the images and features kept."""
        return sum(t.numel() * t.element_size() for kept in self._kept for t in (kept.image, kept.features))

    @property
    def features(self) -> list[Tensor]:
        """Features [M, h] of each image kept, place by place: what cannot be drawn from the stream again."""
        return [kept.features for kept in self._kept]

    def update(self, images: Tensor, labels: Tensor, features: Tensor | None) -> None:
        """Offer a batch: images [B, ...], labels [B], features [M, B, h]. What is kept is copied, on its device.

        Without features the images are drawn all the same; `restore` brings the features.
        """
        first, step = self.shard
        positions = first + step * np.arange(self._seen, self._seen + len(labels))
        numbers = draw(positions, self.seed).tolist()
        for i, (label, position, number) in enumerate(zip(labels.tolist(), positions.tolist(), numbers, strict=True)):
            place = self._place(number)
            if place is not None:
                of_image = _none() if features is None else features[:, i].clone()
                self._kept[place : place + 1] = [_Kept(images[i].clone(), of_image, label, position)]
        self._seen += len(labels)

    def share(self, ranks: Ranks) -> None:
        """Show only this rank's part of the sample of all ranks' streams so far; to be called again after updates.

        Collective. What is kept does not change: at most `capacity` images on each rank, and as many shown in all.
        """
        if self.capacity is None or ranks.alone:
            return
        mine = torch.tensor([-negative for negative, _ in self._largest], dtype=torch.int64, device="cpu")
        numbers = torch.cat(ranks.gather(mine)).sort().values
        self._limit = int(numbers[self.capacity - 1]) if len(numbers) > self.capacity > 0 else None

    def restore(self, features: list[Tensor]) -> None:
        """Put back the `features` of a sample that has been offered the same stream."""
        if len(features) != len(self):
            raise StatisticsError(f"features of {len(features)} images for a sample of {len(self)}")
        self._kept = [kept._replace(features=own) for kept, own in zip(self._kept, features, strict=True)]

    def fold(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [n, ...], labels [n] and features [M, n, h] of fold k, in the order of the stream."""
        kept = self._in_order()
        folds = folds_of(np.array([one.position for one in kept], dtype=np.int64), self.folds)
        return _stacked([one for one, fold in zip(kept, folds, strict=True) if fold == k])

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """All images [n, ...], labels [n] and features [M, n, h], in the order of the stream."""
        return _stacked(self._in_order())

    def _place(self, number: int) -> int | None:
        """Where an image that drew this number is kept, if it is."""
        if self.capacity is None:
            return len(self._kept)
        if len(self._kept) < self.capacity:
            heapq.heappush(self._largest, (-number, len(self._kept)))
            return len(self._kept)
        if not self._largest or number >= -self._largest[0][0]:
            return None
        place = self._largest[0][1]
        heapq.heapreplace(self._largest, (-number, place))
        return place

    def _in_order(self) -> list[_Kept]:
        shown = self._kept
        if self._limit is not None:
            shown = [self._kept[place] for negative, place in self._largest if -negative <= self._limit]
        return sorted(shown, key=lambda kept: kept.position)


class _Kept(NamedTuple):
    """An image [3, H, W], its features [M, h], its label, and its place in the whole stream."""

    image: Tensor
    features: Tensor
    label: int
    position: int


def _stacked(kept: list[_Kept]) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.tensor([one.label for one in kept], dtype=torch.int64, device="cpu")
    if not kept:
        return _none(), labels, _none()
    return torch.stack([one.image for one in kept]), labels, torch.stack([one.features for one in kept], dim=1)


def folds_of(positions: np.ndarray, folds: int) -> np.ndarray:
    """Folds [n], from 0 to folds - 1, of the images at these places [n] of the whole stream.

    Of any `folds` images in a row, counted from the first, one goes to each fold: folds are of one size, and a class
    whose images follow one another is dealt to all of them. Which fold a row begins with is drawn anew for each, or
    labels that take turns could make every fold a class of its own, which no other fold has seen.
    """
    return (positions + draw(positions // folds, seed=0) % folds) % folds


def draw(positions: np.ndarray, seed: int) -> np.ndarray:
    """A random number in [0, 2⁶³) for every position [n]: SplitMix64 (Steele, Lea & Flood 2014), whose counter the
    seed sets off, less a bit."""
    offset = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = offset + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _none() -> Tensor:
    """Float32 [0], for features or images that there are not."""
    return torch.empty(0, dtype=torch.float32, device="cpu")
