"""A uniform random sample of images from a stream that is read once, the same however the stream is shared out.

Every image draws a number from its place in the whole stream and a seed, and the images with the smallest numbers are
the sample (bottom-k sampling; Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches"). Ranks that each keep
their own smallest hold, together, those of the whole.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

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
        self._images: list[Tensor] = []
        self._features: list[Tensor] = []
        self._labels: list[int] = []
        self._positions: list[int] = []
        self._largest: list[tuple[int, int]] = []  # heap of (-number, place)
        self._limit: int | None = None
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
        first, step = self.shard
        positions = first + step * np.arange(self._seen, self._seen + len(labels))
        numbers = draw(positions, self.seed).tolist()
        for i, (label, position, number) in enumerate(zip(labels.tolist(), positions.tolist(), numbers, strict=True)):
            place = self._place(number)
            if place is not None:
                of_image = _none() if features is None else features[:, i].clone()
                self._put(place, images[i].clone(), label, of_image, position)
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
        self._features = list(features)

    def fold(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [n, ...], labels [n] and features [M, n, h] of fold k, in the order of the stream."""
        folds = folds_of(np.array(self._positions, dtype=np.int64), self.folds)
        return self._select([i for i in self._in_order() if folds[i] == k])

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """All images [n, ...], labels [n] and features [M, n, h], in the order of the stream."""
        return self._select(self._in_order())

    def _place(self, number: int) -> int | None:
        if self.capacity is None:
            return len(self._images)
        if len(self._images) < self.capacity:
            heapq.heappush(self._largest, (-number, len(self._images)))
            return len(self._images)
        if not self._largest or number >= -self._largest[0][0]:
            return None
        place = self._largest[0][1]
        heapq.heapreplace(self._largest, (-number, place))
        return place

    def _put(self, place: int, image: Tensor, label: int, features: Tensor, position: int) -> None:
        if place == len(self._images):
            self._images.append(image)
            self._features.append(features)
            self._labels.append(label)
            self._positions.append(position)
        else:
            self._images[place], self._features[place] = image, features
            self._labels[place], self._positions[place] = label, position

    def _in_order(self) -> list[int]:
        shown: Sequence[int] = range(len(self._positions))
        if self._limit is not None:
            shown = [place for negative, place in self._largest if -negative <= self._limit]
        return sorted(shown, key=self._positions.__getitem__)

    def _select(self, chosen: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        labels = torch.tensor([self._labels[i] for i in chosen], dtype=torch.int64, device="cpu")
        if not chosen:
            return _none(), labels, _none()
        features = torch.stack([self._features[i] for i in chosen], dim=1)
        return torch.stack([self._images[i] for i in chosen]), labels, features


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
