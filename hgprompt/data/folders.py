"""The images of a folder as tensors: decoded into memory, decoded on demand, or as a loader.

Images come out as uint8 [3, H, W], resized without keeping the aspect and not augmented (VTAB's transform); the
backbone normalises them.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hgprompt.arguments import whole
from hgprompt.data.bad_images import BadImages, BadOnes, ImageLoader, Skipped, check_policy, report_skipped
from hgprompt.data.images import LabelledImages
from hgprompt.data.listing import ImageTask, count_classes
from hgprompt.data.picture import MAX_PIXELS, read_image
from hgprompt.errors import DataError, OptionError

WORKER_TIMEOUT = 300.0
MAX_CACHE_BYTES = 4 * 2**30
_QUEUE = 4096
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Decoded images (uint8 [3, H, W]) and labels of a task.

    Args:
        samples: (file, label) pairs.
        image_size: (height, width) to resize to, or both in one number.
        interpolation: "bicubic", "bilinear", "nearest" or "lanczos".
        max_pixels: an image with more is refused before it is decoded.
        name, class_names: of the task. skipped: what was left out of it already.

    Raises:
        DataError: an image that is asked for cannot be read; `readable` leaves out those that cannot.

    Transparency is laid on white, 16 bit are scaled to 8, the first frame of an animation is taken, and a photograph
    is turned as its EXIF data says.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        image_size: int | tuple[int, int],
        *,
        interpolation: str = "bicubic",
        max_pixels: int = MAX_PIXELS,
        name: str = "images",
        class_names: tuple[str, ...] | None = None,
        skipped: Skipped | None = None,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise OptionError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.samples = samples
        self.image_size = as_pair(image_size)
        self.interpolation = interpolation
        self.max_pixels = max_pixels
        self.name = name
        self.class_names = class_names
        self.skipped = skipped

    @property
    def num_classes(self) -> int:
        """C: as many as have names, or one more than the largest label."""
        return count_classes(self.samples, self.class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = read_image(path, self.max_pixels)
        height, width = self.image_size
        image = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), label

    def readable(self, report: Callable[[int, int], None] | None = None) -> ImageDataset:
        """The dataset of those images that can be read; each is decoded once, to know.

        Args:
            report: called with (images done, images in all).

        Raises, warns: as `hgprompt.data.bad_images.report_skipped`.
        """
        bad = _read_all(self, None, report)
        skipped = report_skipped(self.samples, bad)
        if skipped is None:
            return self
        return ImageDataset(
            [sample for i, sample in enumerate(self.samples) if i not in bad.places],
            self.image_size,
            interpolation=self.interpolation,
            max_pixels=self.max_pixels,
            name=self.name,
            class_names=self.class_names,
            skipped=skipped,
        )


def make_loader(
    task: ImageTask,
    image_size: int | tuple[int, int],
    *,
    batch_size: int = 32,
    interpolation: str = "bicubic",
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    limit: int | None = None,
    timeout: float = WORKER_TIMEOUT,
    bad_images: BadImages = "stop",
) -> DataLoader[tuple[Tensor, int]]:
    """A DataLoader of uint8 images [B, 3, H, W] and labels [B].

    Args:
        limit: only this many images, taken from the classes in turn (each in random order of the seed).
        shuffle, seed: order of the images; the global random state is neither read nor changed.
        timeout: seconds that worker processes may take for a batch, before they count as hanging and the loader fails.
            0: for ever.
        bad_images: "stop": a DataError for an image that cannot be read. "skip": batches shrink by such images, and the
            end of the pass reports them (`ImageLoader`).
    """
    check_policy(bad_images)
    _check_task(task)
    samples = task.samples if limit is None else balanced(task.samples, limit, seed)
    generator = torch.Generator().manual_seed(seed)
    dataset = ImageDataset(samples, image_size, interpolation=interpolation)
    options: dict[str, Any] = {
        "batch_size": batch_size, "shuffle": shuffle, "num_workers": workers, "timeout": timeout if workers else 0,
        "generator": generator,
    }  # fmt: skip
    if bad_images == "skip":
        return ImageLoader(samples, dataset, **options)
    return DataLoader(dataset, **options)


def open_images(
    task: ImageTask,
    image_size: int | tuple[int, int],
    *,
    interpolation: str = "bicubic",
    limit: int | None = None,
    seed: int = 0,
    max_bytes: int = MAX_CACHE_BYTES,
    report: Callable[[int, int], None] | None = None,
    bad_images: BadImages = "stop",
) -> LabelledImages | ImageDataset:
    """The images of a task: decoded into memory where they fit, decoded again whenever they are asked for where not.

    Args:
        limit, seed: only this many images, as for `make_loader`.
        max_bytes: what decoded images may take. 1,000 images of 224 × 224 take 150 MB.
        report: called with (images done, images in all) while decoding.
        bad_images: "stop": a DataError for an image that cannot be read. "skip": it is left out and reported, in
            `skipped` of what is returned and as a warning; images that stay on disk are all decoded once for it.

    Raises:
        DataError: an image cannot be read, or more of them than may be skipped.
    """
    check_policy(bad_images)
    _check_task(task)
    samples = task.samples if limit is None else balanced(task.samples, limit, seed)
    names = task.class_names or tuple(f"class {i}" for i in range(task.num_classes))
    dataset = ImageDataset(samples, image_size, interpolation=interpolation, name=task.name, class_names=names)
    height, width = dataset.image_size
    if len(samples) * 3 * height * width <= max_bytes:
        return _decoded(dataset, report, bad_images)
    return dataset.readable(report) if bad_images == "skip" else dataset


def _check_task(task: ImageTask) -> None:
    if not isinstance(task, ImageTask):
        raise DataError(f"task must be what load_task makes of a folder, got {type(task).__name__}")


def as_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), which may be given as one number; OptionError."""
    pair = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(pair) != 2:
        raise OptionError(f"image_size must be (height, width) or one number, got {image_size!r:.80}")
    height, width = (whole("image_size", pixels) for pixels in pair)
    if min(height, width) < 1:
        raise OptionError(f"image_size must be at least 1, got {image_size!r:.80}")
    return height, width


def decode(task: ImageTask, image_size: int | tuple[int, int], **options: Any) -> LabelledImages:
    """The images of a task, decoded into memory; arguments as for `open_images`.

    Raises:
        DataError: an image cannot be read, or the images do not fit.
    """
    images = open_images(task, image_size, **options)
    if isinstance(images, LabelledImages):
        return images
    height, width = images.image_size
    size = len(images) * 3 * height * width / 2**30
    raise DataError(
        f"{task.name}: {len(images)} images of {width}×{height} take {size:.1f} GiB "
        "decoded, more than max_bytes: use fewer (limit=), or do not decode them all at once (open_images, make_loader)"
    )


def _decoded(dataset: ImageDataset, report: Callable[[int, int], None] | None, bad_images: BadImages) -> LabelledImages:
    images = torch.empty(len(dataset), 3, *dataset.image_size, dtype=torch.uint8, device="cpu")
    labels = torch.tensor([label for _, label in dataset.samples], dtype=torch.int64, device="cpu")
    bad = _read_all(dataset, images, report, stop=bad_images == "stop")
    skipped = report_skipped(dataset.samples, bad)
    if skipped is not None:
        good = [i for i in range(len(dataset)) if i not in bad.places]
        for place, i in enumerate(good):  # in place: a gather would take the memory twice
            images[place] = images[i]
        images, labels = images[: len(good)], labels[good]
    return LabelledImages(dataset.name, images, labels, dataset.class_names, skipped)


def _read_all(
    dataset: ImageDataset, into: Tensor | None, report: Callable[[int, int], None] | None, *, stop: bool = False
) -> BadOnes:
    """Decode all images, on all cores (decoders run beside each other); which of them are bad."""

    def read(i: int) -> str | None:
        try:
            image = dataset[i][0]
        except DataError as error:
            if stop:
                raise
            return str(error)
        if into is not None:
            into[i] = image
        return None

    bad, count = BadOnes(), len(dataset)
    with warnings.catch_warnings(), ThreadPoolExecutor(available_cores()) as pool:
        warnings.filterwarnings("ignore", module="PIL")  # of metadata that it cannot read, and we do not need
        # An image that waits for its turn takes 2 kB: so a few thousand wait, and not millions.
        parts = (range(start, min(start + _QUEUE, count)) for start in range(0, count, _QUEUE))
        for i, wrong in enumerate(itertools.chain.from_iterable(pool.map(read, part) for part in parts)):
            if wrong is not None:
                bad.add(i, wrong)
            if report is not None:
                report(i + 1, count)
    return bad


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def balanced(samples: Sequence[tuple[Path, int]], limit: int, seed: int) -> tuple[tuple[Path, int], ...]:
    """At most `limit` samples, one class after the other in turn, in the order in which they came."""
    if limit < 1:
        raise OptionError(f"limit must be at least 1, got {limit}")
    seen: Counter[int] = Counter()
    turns = []
    for i in np.random.default_rng(seed).permutation(len(samples)).tolist():
        label = samples[i][1]
        turns.append((seen[label], label, i))
        seen[label] += 1
    return tuple(samples[i] for i in sorted(i for _, _, i in sorted(turns)[:limit]))
