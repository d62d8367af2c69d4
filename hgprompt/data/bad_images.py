"""What becomes of an image that cannot be read: it stops the work, or it is left out and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hgprompt.errors import DataError, OptionError, warn
from hgprompt.workers import end_workers

BadImages = Literal["stop", "skip"]
MAX_SKIPPED = 0.5
"""Of the images, at most this share may be left out."""
_SHOWN = 10


@dataclass(frozen=True)
class Skipped:
    """Images that were left out.

    Attributes:
        count: how many. total: of how many. first: what was wrong with the first few, each with the file's name.
    """

    count: int
    total: int
    first: tuple[str, ...]

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"skipped {self.count} of {self.total} images: " + "; ".join(self.first) + more

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"first": list(self.first)}


class BadOnes:
    """Places of the images that cannot be read, and what is wrong with the first few: of millions, only their places
    are kept."""

    def __init__(self) -> None:
        self.places: set[int] = set()
        self._first: dict[int, str] = {}

    @property
    def first(self) -> tuple[str, ...]:
        """What is wrong with those of the lowest places."""
        return tuple(self._first[place] for place in sorted(self._first))

    def add(self, place: int, wrong: str) -> None:
        self.places.add(place)
        self._first[place] = wrong
        if len(self._first) > _SHOWN:
            del self._first[max(self._first)]


def check_policy(bad_images: str) -> None:
    """Raise OptionError unless this is a policy."""
    if bad_images not in ("stop", "skip"):
        raise OptionError(f"bad_images must be 'stop' or 'skip', got {bad_images!r}")


def report_skipped(samples: Sequence[tuple[Path, int]], bad: BadOnes) -> Skipped | None:
    """Say what was left out; None where that is nothing.

    Args:
        samples: (file, label) of all images. bad: those of them that were left out.

    Raises:
        DataError: more than MAX_SKIPPED of the images, or all images of a class: that is no task any more.

    Warns:
        HGPromptWarning: how many, and the first few with their reasons.
    """
    if not bad.places:
        return None
    skipped = Skipped(len(bad.places), len(samples), bad.first)
    if skipped.count > MAX_SKIPPED * len(samples):
        raise DataError(f"{skipped}. More than {100 * MAX_SKIPPED:.0f} % cannot be read: this is not the right folder")
    lost = Counter(samples[i][1] for i in bad.places)
    gone = [label for label, count in Counter(label for _, label in samples).items() if lost[label] == count]
    if gone:
        raise DataError(f"{skipped}. No image is left of class {', '.join(map(str, sorted(gone)[:10]))}")
    warn(str(skipped))
    return skipped


class Tolerant(Dataset[tuple[int, Any]]):
    """A dataset's items with their places, and in place of a bad one what was wrong with it."""

    def __init__(self, dataset: Dataset[tuple[Tensor, int]]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[int, Any]:
        try:
            return index, self.dataset[index]
        except DataError as error:
            return index, str(error)


class ImageLoader(DataLoader[Any]):
    """A DataLoader of (images, labels) that leaves out what cannot be read; a batch shrinks by what is missing.

    Args:
        samples: (file, label) of the images. dataset: the same images, decoded. options: as for DataLoader.

    Attributes:
        skipped: what the last pass left out, once it is over; a pass that is given up says nothing.

    A pass raises and warns as `report_skipped` does, at its end, and knows of its own images only: of loaders that
    share images over ranks, each judges its share. Batches of which nothing is left do not appear.

    Code that builds a new DataLoader from this one's parts, as `accelerate.Accelerator.prepare` does, goes past
    `__iter__` and gets batches of three parts: images, labels, and what was wrong. Prepare a DataLoader of
    `ImageDataset.readable()` instead.
    """

    def __init__(
        self, samples: Sequence[tuple[Path, int]], dataset: Dataset[tuple[Tensor, int]], **options: Any
    ) -> None:
        super().__init__(Tolerant(dataset), collate_fn=_collate, **options)
        self.samples = samples
        self.skipped: Skipped | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # an iterator all the same
        return self._readable(super().__iter__())

    def _readable(self, batches: Iterator[Any]) -> Iterator[Any]:
        found = BadOnes()
        self.skipped = None
        try:
            for images, labels, bad in batches:
                for place, wrong in bad.items():
                    found.add(place, wrong)
                if len(labels):
                    yield images, labels
        finally:  # the caller has no way to reach them
            end_workers(self, batches)
        self.skipped = report_skipped(self.samples, found)


def _collate(items: Sequence[tuple[int, Any]]) -> tuple[Tensor, Tensor, dict[int, str]]:
    good = [item for _, item in items if not isinstance(item, str)]
    bad = {index: item for index, item in items if isinstance(item, str)}
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0, dtype=torch.float32, device="cpu")
    return images, torch.tensor([label for _, label in good], dtype=torch.int64, device="cpu"), bad
