"""Which images a folder lists, and with which labels: VTAB-1k's split files, or one folder per class.

A folder may come from anybody: lines, classes and names are limited, and every file that is listed is a regular file
inside the folder, wherever links lead.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hgprompt.data.picture import SUFFIXES
from hgprompt.errors import DataError, FileFormatError
from hgprompt.files import open_regular

MAX_SAMPLES = 4_000_000
"""Images of a folder; each takes a few hundred bytes, of its path."""
MAX_CLASSES = 100_000
MAX_LINE = 10_000
MAX_LIST_BYTES = 2**30
_MAX_CLASS_NAME = 1_000
_MAX_DEPTH = 32  # folders of a path in a list: each takes memory of its own, and more time where it is a link
_MAX_KNOWN = 10_000  # folders that are remembered to be inside
_MAX_SPLITS = 100  # text files that are looked at, to say which splits there are
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


def load_task(folder: str | Path, split: str = "train800val200", *, follow_links: bool = False) -> ImageTask:
    """The images and labels of a folder.

    Args:
        folder: either VTAB-1k's layout (`<split>.txt` with lines `path label`, paths relative to the folder, and
            optionally `classes.txt` with a name per line), or one sub-folder of images per class: labels are then
            the places of the sub-folders' names in sorted order. A VTAB-1k task that is not there under this name
            is looked for under its other names (VTAB_ALIASES).
        split: which split file; a folder with sub-folders of images has no splits and ignores it.
        follow_links: also take files that links or `..` lead to outside the folder; only for a folder of your own.

    Raises:
        DataError: what is wrong, in which file and line.
    """
    folder = under_an_alias(Path(folder))
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder of images")
    root = _Root(folder, follow_links)
    try:
        if (folder / f"{split}.txt").is_file():
            return _from_split_file(root, folder / f"{split}.txt")
        splits = _splits(root)
        if splits:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        return _from_class_folders(root)
    except FileFormatError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error


def count_classes(samples: Sequence[tuple[Path, int]], class_names: tuple[str, ...] | None) -> int:
    """C: as many as have names, or one more than the largest label."""
    return max((label for _, label in samples), default=-1) + 1 if class_names is None else len(class_names)


class _Root:
    """A folder, and whether what is found in it is inside it."""

    def __init__(self, folder: Path, follow_links: bool) -> None:
        self.folder, self.follow_links = folder, follow_links
        self._real = os.path.join(os.path.realpath(folder), "")
        self._inside: dict[Path, bool] = {}  # of folders: a list names few of them, and many files

    def holds(self, path: Path) -> bool:
        """Whether a file or folder is inside, wherever links and dots lead."""
        if self.follow_links:
            return True
        parent = path.parent
        inside = self._inside.get(parent)
        if inside is None:
            if len(self._inside) >= _MAX_KNOWN:
                self._inside.clear()
            inside = self._inside[parent] = self._is_inside(parent)
        return inside and (self._is_inside(path) if path.is_symlink() else True)

    def _is_inside(self, path: Path) -> bool:
        return os.path.join(os.path.realpath(path), "").startswith(self._real)


def under_an_alias(folder: Path) -> Path:
    """The folder, or where it is not there, one beside it that has another of the task's names."""
    if folder.is_dir():
        return folder
    for names in VTAB_ALIASES:
        if folder.name in names:
            there = [folder.with_name(name) for name in names if folder.with_name(name).is_dir()]
            return there[0] if there else folder
    return folder


def _from_split_file(root: _Root, file: Path) -> ImageTask:
    folder = root.folder
    class_names = _class_names(root, folder / "classes.txt")
    known = MAX_CLASSES if class_names is None else len(class_names)
    samples: list[tuple[Path, int]] = []
    for number, line in _lines(root, file, MAX_SAMPLES):
        try:
            name, text = line.rsplit(maxsplit=1)
            if "_" in text:  # which int() reads over
                raise ValueError
            label = int(text)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: expected 'path label', got {line.strip()[:100]!r}") from error
        if not 0 <= label < known:
            where = f"of at most {known}" if class_names is None else f"of {known} in classes.txt"
            raise DataError(f"{file}, line {number}: label {text[:30]} is no class {where}")
        if not root.follow_links and ".." in name.split("/"):
            raise DataError(
                f"{file}, line {number}: {name[:100]!r} has '..' in it, and may so lead out of {folder}: name files by "
                "their place in it, or, where the folder is your own, follow links (follow_links=True, --follow-links)"
            )
        if name.count("/") > _MAX_DEPTH:
            raise DataError(f"{file}, line {number}: {name[:100]!r} is more than {_MAX_DEPTH} folders deep")
        path = folder / name
        try:
            inside, there = root.holds(path), path.is_file()
        except (OSError, ValueError) as error:  # a name that no file can have
            raise DataError(f"{file}, line {number}: {name[:100]!r} names no file ({error})"[:400]) from error
        if not inside:
            raise DataError(f"{file}, line {number}: {name[:100]!r} leads out of {folder}")
        if not there:
            raise DataError(f"{file}, line {number}: {str(path)[:400]} does not exist")
        samples.append((path, label))
    if not samples:
        raise DataError(f"{file} lists no images")
    return ImageTask(_name_of(folder), tuple(samples), class_names)


def _class_names(root: _Root, file: Path) -> tuple[str, ...] | None:
    if not file.is_file():
        return None
    return tuple(_printable(line.strip()[:_MAX_CLASS_NAME]) for _, line in _lines(root, file, MAX_CLASSES))


def _lines(root: _Root, file: Path, limit: int) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers; DataError for more than `limit` lines."""
    if not root.holds(file):
        raise DataError(f"{file} is a link that leads out of {root.folder}")
    with (
        open_regular(file, MAX_LIST_BYTES) as binary,
        io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace") as lines,
    ):
        for number in itertools.count(1):
            line = lines.readline(MAX_LINE + 1)
            if not line:
                return
            if number > limit:
                raise DataError(f"{file} has more than {limit} lines")
            if len(line) > MAX_LINE:
                raise DataError(f"{file}, line {number} is longer than {MAX_LINE} characters: no list of images")
            if line.strip():
                yield number, line


def _splits(root: _Root) -> list[str]:
    """Names of the split files of a folder, for an error that lists them."""
    texts = (p for p in _entries(root.folder) if p.suffix == ".txt" and p.name != "classes.txt" and p.is_file())
    return sorted(_printable(p.stem) for p in itertools.islice(texts, _MAX_SPLITS) if _lists_images(root, p))


def _lists_images(root: _Root, file: Path) -> bool:
    """Whether a text file looks like a split: its first line is an image file and a number, as no README's is."""
    if not root.holds(file):
        return False
    with open_regular(file, sys.maxsize) as binary:
        first = binary.readline(MAX_LINE).decode("utf-8-sig", errors="replace")
    name, _, label = first.strip().rpartition(" ")
    return label.isdecimal() and name.strip().lower().endswith(SUFFIXES)


def _from_class_folders(root: _Root) -> ImageTask:
    folder = root.folder
    places = (p for p in _entries(folder) if not p.name.startswith(".") and p.is_dir())
    classes = sorted(itertools.islice(places, MAX_CLASSES + 1))
    if not classes:
        raise DataError(f"{folder} has neither split files (such as train800val200.txt) nor a folder per class")
    if len(classes) > MAX_CLASSES:
        raise DataError(f"{folder} has more than {MAX_CLASSES} folders: too many to be classes")
    samples: list[tuple[Path, int]] = []
    for label, place in enumerate(classes):
        files = sorted(p for p in _entries(place) if _is_image(p)) if root.holds(place) else [place]
        if not files:
            inner = next((p for p in _entries(place) if p.is_dir()), None) if root.holds(place) else None
            hint = "" if inner is None else f", but folders: is {place} itself the task, as in train/CLASS/?"
            raise DataError(f"class folder {place} holds no images ({', '.join(SUFFIXES)}){hint}")
        for path in files:
            if not root.holds(path):
                raise DataError(
                    f"{path} is a link that leads out of {folder}: copy what it leads to, or, where the folder is your "
                    "own, follow links (load_task(..., follow_links=True), on the command line --follow-links)"
                )
        samples += [(p, label) for p in files]
        if len(samples) > MAX_SAMPLES:
            raise DataError(f"{folder} holds more than {MAX_SAMPLES} images")
    return ImageTask(_name_of(folder), tuple(samples), tuple(_printable(p.name) for p in classes))


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder, in no order; DataError for more than MAX_SAMPLES things."""
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries, start=1):
            if count > MAX_SAMPLES:
                raise DataError(f"{folder} holds more than {MAX_SAMPLES} things")
            yield folder / entry.name


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _name_of(folder: Path) -> str:
    """A task's name: its folder's, also where that was given as "."."""
    return _printable(Path(os.path.abspath(folder)).name)


def _printable(name: str) -> str:
    """Without characters that steer a terminal or that no UTF-8 file can hold."""
    return name if name.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
