"""Write the procedural tasks as folders in VTAB-1k's layout, for `hgprompt reproduce`.

    python recipes/procedural_folders.py TASKS/ [--tasks object-count azimuth] [--size 64] [--test 500]

1,000 training images of each task, the last 200 of which are val200, and --test others. A folder that is there already
is left as it is; a new one appears whole or not at all.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from hgprompt.data import PROCEDURAL_TASKS, LabelledImages, render_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=list(PROCEDURAL_TASKS), default=list(PROCEDURAL_TASKS))
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--test", type=int, default=500, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        if not (args.root / task).exists():
            write(args.root / task, task, args.size, args.test, args.seed)
            print(args.root / task, flush=True)


def write(folder: Path, task: str, size: int, test: int, seed: int) -> None:
    """A folder of a task, renamed into place when it is whole."""
    splits = {
        "train800val200": render_task(task, 1000, image_size=size, seed=seed),
        "test": render_task(task, test, image_size=size, seed=seed, split="test"),
    }
    unfinished = Path(tempfile.mkdtemp(prefix=f".{task}-", dir=folder.parent))
    try:
        for split, images in splits.items():
            lines = _save(images, unfinished, split)
            _list(unfinished, split, lines)
            if split == "train800val200":
                _list(unfinished, "train800", lines[:800])
                _list(unfinished, "val200", lines[800:])
        names = splits["test"].class_names
        if names:
            (unfinished / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's are for their owner alone
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _save(images: LabelledImages, folder: Path, split: str) -> list[str]:
    """Lines of the split's list, after its images are written."""
    (folder / "images" / split).mkdir(parents=True)
    lines = []
    for i in range(len(images)):
        name = f"images/{split}/{i:06d}.png"
        Image.fromarray(images.images[i].permute(1, 2, 0).numpy()).save(folder / name)
        lines.append(f"{name} {int(images.labels[i])}\n")
    return lines


def _list(folder: Path, split: str, lines: list[str]) -> None:
    (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
