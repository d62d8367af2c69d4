"""The 19 tasks of VTAB-1k, and what of them is in a folder: found, checked, and never silently a part of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hgprompt.data import ImageDataset, ImageTask, LabelledImages, decode, load_task, open_images
from hgprompt.data.listing import VTAB_ALIASES
from hgprompt.errors import DataError

Group = Literal["natural", "specialized", "structured", "own"]
GROUPS: tuple[Group, ...] = ("natural", "specialized", "structured", "own")
SPLITS = ("train800", "val200", "train800val200", "test")
_SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}


@dataclass(frozen=True)
class VtabTask:
    """A task of VTAB-1k (Zhai et al. 2019).

    Attributes:
        name: of its folder. title: as the paper's tables print it. group: of VTAB. classes: C. test: test images.
        in_paper: whether it is one of the 13 of Table 1.
    """

    name: str
    title: str
    group: Group
    classes: int
    test: int
    in_paper: bool


VTAB = (
    VtabTask("cifar", "CIFAR-100", "natural", 100, 10_000, True),
    VtabTask("caltech101", "Caltech101", "natural", 102, 6_084, False),
    VtabTask("dtd", "DTD", "natural", 47, 1_880, True),
    VtabTask("oxford_flowers102", "Flowers102", "natural", 102, 6_149, True),
    VtabTask("oxford_iiit_pet", "Pets", "natural", 37, 3_669, True),
    VtabTask("svhn", "SVHN", "natural", 10, 26_032, True),
    VtabTask("sun397", "SUN397", "natural", 397, 21_750, False),
    VtabTask("patch_camelyon", "Camelyon", "specialized", 2, 32_768, False),
    VtabTask("eurosat", "EuroSAT", "specialized", 10, 5_400, True),
    VtabTask("resisc45", "Resisc45", "specialized", 45, 6_300, False),
    VtabTask("diabetic_retinopathy", "Retinopathy", "specialized", 5, 42_670, False),
    VtabTask("dmlab", "DMLab", "structured", 6, 22_735, True),
    VtabTask("smallnorb_azi", "sNORB-Azim", "structured", 18, 12_150, True),
    VtabTask("smallnorb_ele", "sNORB-Elev", "structured", 9, 12_150, True),
    VtabTask("dsprites_loc", "dSpr-Loc", "structured", 16, 73_728, True),
    VtabTask("dsprites_ori", "dSpr-Ori", "structured", 16, 73_728, True),
    VtabTask("clevr_count", "Clevr-Count", "structured", 8, 15_000, True),
    VtabTask("clevr_dist", "Clevr-Dist", "structured", 6, 15_000, True),
    VtabTask("kitti", "KITTI-Dist", "structured", 4, 711, False),
)
"""In the order of the paper's Table 1, with VTAB's other tasks where their groups are."""
_BY_NAME = {task.name: task for task in VTAB}


def canonical(name: str) -> str:
    """A task's own name, for any of its names (VTAB_ALIASES)."""
    return next((names[0] for names in VTAB_ALIASES if name in names), name)


@dataclass(frozen=True, eq=False)
class TaskFolder:
    """A task on disk, checked.

    Attributes:
        name: canonical. title: for tables. group: VTAB's, or "own". num_classes: C over all splits.
        splits: samples of each of SPLITS. digest: of all split lists and their files' sizes, wherever the folder lies.
        notes: what is unusual and no error.
    """

    name: str
    title: str
    group: Group
    num_classes: int
    splits: dict[str, ImageTask]
    digest: str
    notes: tuple[str, ...] = ()

    def load(
        self,
        image_size: tuple[int, int],
        interpolation: str,
        *,
        test_limit: int | None = None,
        report: Callable[[int, int], None] | None = None,
    ) -> LoadedTask:
        """Decode it; the test images stay on disk where they are too many.

        Args:
            test_limit: only this many test images, classes in turn.
            report: called with (images done, images in all) of each split.

        Raises:
            DataError: an image cannot be read.
        """
        train, val, both = (
            decode(self.splits[split], image_size, interpolation=interpolation, report=report) for split in SPLITS[:3]
        )
        test = open_images(
            self.splits["test"], image_size, interpolation=interpolation, limit=test_limit, report=report
        )
        return LoadedTask(self, train, val, both, test)


@dataclass(frozen=True, eq=False)
class LoadedTask:
    """Decoded images of a task's splits; they agree on the classes."""

    folder: TaskFolder
    train800: LabelledImages
    val200: LabelledImages
    train800val200: LabelledImages
    test: LabelledImages | ImageDataset


@dataclass(frozen=True, eq=False)
class Suite:
    """The tasks of a data root.

    Attributes:
        tasks: {name: folder}, VTAB's in the order of the tables, then a user's own by name.
        missing: names that were wanted and are not there.
    """

    root: Path
    tasks: dict[str, TaskFolder]
    missing: tuple[str, ...]

    def named(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of these names (any alias, or a group as for `find_suite`) that are among the tasks, in their order.

        Raises:
            DataError: none is.
        """
        meant = _expanded(names, [n for n in self.tasks if n not in _BY_NAME])
        found = tuple(n for n in self.tasks if n in meant)
        if not found:
            raise DataError(_none_of(self.root, meant, self.tasks))
        return found

    def lines(self) -> list[str]:
        """What a reader has to know of what is and is not there, a sentence each."""
        said = [f"{task.name}: {note}" for task in self.tasks.values() for note in task.notes]
        if self.missing:
            where = f"not in {self.root}"
            said.insert(0, f"skipped, {where}: {', '.join(self.missing)} ({len(self.tasks)} tasks are there)")
        return said


def find_suite(root: str | Path, wanted: Sequence[str] | None = None) -> Suite:
    """The tasks of a folder, each checked.

    Args:
        root: holds a folder per task, in VTAB-1k's layout.
        wanted: names (any alias); "all" stands for all of VTAB and the folder's own tasks. None: the paper's 13, and
            every other folder with split files that is none of VTAB's.

    Raises:
        DataError: no such folder, none of the tasks is there, or a task is not what it should be (all that is wrong
        with it is in the message).
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give the one that holds a folder per task, such as {VTAB[0].name}/")
    there = {canonical(p.name): p for p in sorted(root.iterdir(), reverse=True) if (p / "train800.txt").is_file()}
    odd = [name for name in there if not name.isprintable()]
    if odd:
        raise DataError(f"{root}: the folder {odd[0]!r:.100} has a name that cannot be printed; rename it")
    own = sorted(set(there) - set(_BY_NAME))
    names = _expanded(["paper", "own"] if wanted is None else wanted, own)
    for name in names:
        if name not in {*_BY_NAME, *there}:
            raise DataError(
                f"{root} has no task {name!r}, and VTAB-1k has none of that name; it has {', '.join(there) or '–'}"
            )
    order = [*_BY_NAME, *own]
    tasks = {n: check_task(there[n]) for n in sorted(names, key=order.index) if n in there}
    if not tasks:
        raise DataError(_none_of(root, names, there))
    return Suite(root, tasks, tuple(n for n in names if n not in there))


def _expanded(names: Sequence[str], own: Sequence[str]) -> list[str]:
    """Tasks by their own names, each once; groups as the tasks they stand for."""
    groups = {"paper": [task.name for task in VTAB if task.in_paper], "own": own, "all": [*_BY_NAME, *own]}
    return list(dict.fromkeys(task for name in names for task in groups.get(name, [canonical(name)])))


def _none_of(root: Path, names: Sequence[str], there: Iterable[str]) -> str:
    found = ", ".join([*there][:20])
    return (
        f"{root} holds none of the tasks {', '.join(names[:20])}: a task is a folder with "
        f"{', '.join(f'{split}.txt' for split in SPLITS)}, lines 'path label'"
        + (f"; it has {found}: name them (--tasks, and --sources)" if found else "")
    )


def check_task(folder: str | Path) -> TaskFolder:
    """Read a task's split files and check them: VTAB's against VTAB's counts, a user's own against one another.

    Raises:
        DataError: everything that is wrong with it.
    """
    folder = Path(folder)
    name = canonical(folder.name)
    vtab = _BY_NAME.get(name)
    absent = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").is_file()]
    if absent:
        raise DataError(f"{folder} lacks {', '.join(absent)}: a task has a file for each of {', '.join(SPLITS)}")
    splits = {split: load_task(folder, split) for split in SPLITS}
    classes = vtab.classes if vtab else max(task.num_classes for task in splits.values())
    wrong = _wrong_with(splits, vtab, classes)
    if wrong:
        raise DataError(f"{folder} is not as it should be: " + "; ".join(wrong))
    names = splits["train800"].class_names
    if names is None or len(names) != classes:
        names = tuple(f"class {c}" for c in range(classes))
    splits = {split: dataclasses.replace(task, name=name, class_names=names) for split, task in splits.items()}
    absent_classes = classes - len({label for _, label in splits["train800val200"].samples})
    notes = (f"{absent_classes} of {classes} classes have no training image",) if absent_classes else ()
    title, group = (vtab.title, vtab.group) if vtab else (name, "own")
    return TaskFolder(name, title, group, classes, splits, _digest(folder, splits), notes)


def _wrong_with(splits: dict[str, ImageTask], vtab: VtabTask | None, classes: int) -> list[str]:
    wrong = []
    if vtab is not None:
        for split, expected in (_SIZES | {"test": vtab.test}).items():
            count = len(splits[split].samples)
            if count != expected:
                wrong.append(f"{split}.txt has {count} images, VTAB-1k has {expected}")
    for split, task in splits.items():
        largest = max(label for _, label in task.samples)
        if largest >= classes:
            wrong.append(f"{split}.txt has label {largest}, the task has {classes} classes")
    train, val, both = (splits[split].samples for split in SPLITS[:3])
    paths = {path for path, _ in both}
    # Some copies of VTAB-1k keep the 1,000 images once more in a folder of their own: then only labels can be compared.
    apart = paths.isdisjoint({path for path, _ in (*train, *val)})
    same = Counter(label for _, label in both) == Counter(label for _, label in (*train, *val))
    if not (same if apart else Counter(both) == Counter((*train, *val))):
        wrong.append("train800val200.txt is not train800.txt and val200.txt together")
    for one, other in (("train800", "val200"), ("train800val200", "test")):
        shared = {path for path, _ in splits[one].samples} & {path for path, _ in splits[other].samples}
        if shared:
            wrong.append(f"{len(shared)} images are in both {one}.txt and {other}.txt, such as {min(shared).name}")
    return wrong


def _digest(folder: Path, splits: dict[str, ImageTask]) -> str:
    listing = {
        split: [[str(path.relative_to(folder)), path.stat().st_size, label] for path, label in task.samples]
        for split, task in splits.items()
    }
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()
