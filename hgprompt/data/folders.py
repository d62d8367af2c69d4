"""Folders of labelled images: VTAB-1k's split files, or one folder per class.

Images come out as uint8 [3, H, W], resized without keeping the aspect and not augmented (VTAB's transform); the
backbone normalises them. Files are data from strangers: sizes are checked before anything is decoded.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hgprompt.data.images import LabelledImages
from hgprompt.errors import DataError, OptionError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
MAX_LINES = 10_000_000
MAX_CLASSES = 100_000
MAX_PIXELS = 64 * 2**20
WORKER_TIMEOUT = 300.0
MAX_CACHE_BYTES = 4 * 2**30
VTAB_ALIASES = (
    ("cifar", "cifar100"),
    ("oxford_iiit_pet", "oxford_pet"),
    ("oxford_flowers102", "flowers102"),
    ("diabetic_retinopathy", "retinopathy"),
    ("smallnorb_azi", "smallnorb_azimuth"),
    ("smallnorb_ele", "smallnorb_elevation"),
    ("dsprites_loc", "dsprites_location"),
    ("dsprites_ori", "dsprites_orientation"),
)
"""Folder names that the community uses for one and the same task of VTAB-1k."""
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class ImageTask:
    """A labelled set of images.

    Attributes:
        name: of the task (its folder). samples: (file, label) in the order of the split file, or by class and name.
        class_names: names of labels 0, 1, …; None where the folder does not tell.
    """

    name: str
    samples: tuple[tuple[Path, int], ...]
    class_names: tuple[str, ...] | None

    @property
    def num_classes(self) -> int:
        """C: as many as have names, or one more than the largest label."""
        return count_classes(self.samples, self.class_names)


def load_task(folder: str | Path, split: str = "train800val200") -> ImageTask:
    """The images and labels of a folder.

    Args:
        folder: either VTAB-1k's layout (`<split>.txt` with lines `path label`, paths relative to the folder, and
            optionally `classes.txt` with a name per line), or one sub-folder of images per class: labels are then
            the places of the sub-folders' names in sorted order. A VTAB-1k task that is not there under this name
            is looked for under its other names (VTAB_ALIASES).
        split: which split file; a folder with sub-folders of images has no splits and ignores it.

    Raises:
        DataError: what is wrong, in which file and line.
    """
    folder = _under_an_alias(Path(folder))
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of images")
    if (folder / f"{split}.txt").is_file():
        return _from_split_file(folder, folder / f"{split}.txt")
    splits = sorted(p.stem for p in folder.glob("*.txt") if p.name != "classes.txt" and _lists_images(p))
    if splits:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    return _from_class_folders(folder)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Decoded images (uint8 [3, H, W]) and labels of a task.

    Args:
        samples: (file, label) pairs.
        image_size: (height, width) to resize to.
        interpolation: "bicubic", "bilinear", "nearest" or "lanczos".
        max_pixels: an image with more is refused before it is decoded.
        name, class_names: of the task.

    Transparency is laid on white, 16 bit are scaled to 8, the first frame of an animation is taken, and a photograph
    is turned as its EXIF data says.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        image_size: tuple[int, int],
        *,
        interpolation: str = "bicubic",
        max_pixels: int = MAX_PIXELS,
        name: str = "images",
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise OptionError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        self.samples = samples
        self.image_size = image_size
        self.interpolation = interpolation
        self.max_pixels = max_pixels
        self.name = name
        self.class_names = class_names

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


def make_loader(
    task: ImageTask,
    image_size: tuple[int, int],
    *,
    batch_size: int = 32,
    interpolation: str = "bicubic",
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    limit: int | None = None,
    timeout: float = WORKER_TIMEOUT,
) -> DataLoader[tuple[Tensor, int]]:
    """A DataLoader of uint8 images [B, 3, H, W] and labels [B].

    Args:
        limit: only this many images, taken from the classes in turn (each in random order of the seed).
        shuffle, seed: order of the images; the global random state is neither read nor changed.
        timeout: seconds that worker processes may take for a batch, before they count as hanging and the loader fails.
            0: for ever.
    """
    samples = task.samples if limit is None else balanced(task.samples, limit, seed)
    generator = torch.Generator().manual_seed(seed)
    dataset = ImageDataset(samples, image_size, interpolation=interpolation)
    return DataLoader(
        dataset, batch_size, shuffle=shuffle, num_workers=workers, generator=generator,
        timeout=timeout if workers else 0,
    )  # fmt: skip


def open_images(
    task: ImageTask,
    image_size: tuple[int, int],
    *,
    interpolation: str = "bicubic",
    limit: int | None = None,
    seed: int = 0,
    max_bytes: int = MAX_CACHE_BYTES,
    report: Callable[[int, int], None] | None = None,
) -> LabelledImages | ImageDataset:
    """The images of a task: decoded into memory where they fit, decoded again whenever they are asked for where not.

    Args:
        limit, seed: only this many images, as for `make_loader`.
        max_bytes: what decoded images may take. 1,000 images of 224 × 224 take 150 MB.
        report: called with (images done, images in all) while decoding.

    Raises:
        DataError: an image cannot be read.
    """
    samples = task.samples if limit is None else balanced(task.samples, limit, seed)
    names = task.class_names or tuple(f"class {i}" for i in range(task.num_classes))
    dataset = ImageDataset(samples, image_size, interpolation=interpolation, name=task.name, class_names=names)
    height, width = image_size
    return dataset if len(samples) * 3 * height * width > max_bytes else _decoded(dataset, report)


def decode(task: ImageTask, image_size: tuple[int, int], **options: Any) -> LabelledImages:
    """The images of a task, decoded into memory; arguments as for `open_images`.

    Raises:
        DataError: an image cannot be read, or the images do not fit.
    """
    images = open_images(task, image_size, **options)
    if isinstance(images, LabelledImages):
        return images
    height, width = image_size
    size = len(images) * 3 * height * width / 2**30
    raise DataError(
        f"{task.name}: {len(images)} images of {width}×{height} take {size:.1f} GiB "
        "decoded, more than max_bytes: use fewer (limit=), or do not decode them all at once (open_images, make_loader)"
    )


def _decoded(dataset: ImageDataset, report: Callable[[int, int], None] | None) -> LabelledImages:
    """On all cores: decoders run beside each other."""
    images = torch.empty(len(dataset), 3, *dataset.image_size, dtype=torch.uint8)

    def read(i: int) -> None:
        images[i] = dataset[i][0]

    with ThreadPoolExecutor(available_cores()) as pool:
        for done, _ in enumerate(pool.map(read, range(len(dataset))), start=1):
            if report is not None:
                report(done, len(dataset))
    labels = torch.tensor([label for _, label in dataset.samples], dtype=torch.int64)
    return LabelledImages(dataset.name, images, labels, dataset.class_names)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_classes(samples: Sequence[tuple[Path, int]], class_names: tuple[str, ...] | None) -> int:
    """C: as many as have names, or one more than the largest label."""
    return max((label for _, label in samples), default=-1) + 1 if class_names is None else len(class_names)


def balanced(samples: Sequence[tuple[Path, int]], limit: int, seed: int) -> tuple[tuple[Path, int], ...]:
    """At most `limit` samples, one class after the other in turn, in the order in which they came."""
    if limit < 1:
        raise OptionError(f"limit must be at least 1, got {limit}")
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    by_class: dict[int, list[int]] = {}
    for i in order:
        by_class.setdefault(samples[i][1], []).append(i)
    turns = itertools.zip_longest(*(by_class[c] for c in sorted(by_class)))
    chosen = [i for turn in turns for i in turn if i is not None][:limit]
    return tuple(samples[i] for i in sorted(chosen))


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, or DataError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images; ours is an error, below
            with Image.open(path) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(f"{path} is {width}×{height} pixels, over the limit of {max_pixels}")
                return _to_rgb(ImageOps.exif_transpose(image))
    except DataError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit comes first where ours is larger
        raise DataError(f"{path} is too large: {error}") from error
    except Exception as error:  # decoders raise many kinds for damaged files
        raise DataError(f"{path} is no readable image: {type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("its pixels are floating-point numbers of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files have values up to 65535, whatever mode Pillow opens them in.
        return Image.fromarray(np.clip(values / 257, 0, 255).round().astype(np.uint8), "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _under_an_alias(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    for names in VTAB_ALIASES:
        if folder.name in names:
            there = [folder.with_name(name) for name in names if folder.with_name(name).is_dir()]
            return there[0] if there else folder
    return folder


def _from_split_file(folder: Path, file: Path) -> ImageTask:
    class_names = _class_names(folder / "classes.txt")
    root = folder.resolve()
    samples = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if number > MAX_LINES:
                raise DataError(f"{file} has more than {MAX_LINES} lines")
            if not line.strip():
                continue
            try:
                name, text = line.rsplit(maxsplit=1)
                label = int(text)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: expected 'path label', got {line.strip()[:100]!r}") from error
            known = MAX_CLASSES if class_names is None else len(class_names)
            if not 0 <= label < known:
                where = f"of at most {known}" if class_names is None else f"of {known} in classes.txt"
                raise DataError(f"{file}, line {number}: label {text[:30]} is no class {where}")
            path = folder / name
            try:
                inside, there = path.resolve().is_relative_to(root), path.is_file()
            except (OSError, ValueError) as error:  # a name that no file can have
                raise DataError(f"{file}, line {number}: {name[:100]!r} names no file ({error})"[:400]) from error
            if not inside:
                raise DataError(f"{file}, line {number}: {name[:100]!r} leads out of {folder}")
            if not there:
                raise DataError(f"{file}, line {number}: {path} does not exist")
            samples.append((path, label))
    if not samples:
        raise DataError(f"{file} lists no images")
    return ImageTask(folder.name, tuple(samples), class_names)


def _lists_images(file: Path) -> bool:
    """Whether a text file looks like a split: its first line is an image file and a number, as no README's is."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        name, _, label = lines.readline(10_000).strip().rpartition(" ")
    return label.isdecimal() and name.strip().lower().endswith(SUFFIXES)


def _from_class_folders(folder: Path) -> ImageTask:
    classes = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} has neither split files (such as train800val200.txt) nor a folder per class")
    samples = []
    for label, place in enumerate(classes):
        files = sorted(p for p in place.iterdir() if _is_image(p))
        if not files:
            raise DataError(f"class folder {place} holds no images ({', '.join(SUFFIXES)})")
        samples += [(p, label) for p in files]
    return ImageTask(folder.name, tuple(samples), tuple(p.name for p in classes))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _class_names(file: Path) -> tuple[str, ...] | None:
    if not file.is_file():
        return None
    return tuple(
        line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    )
