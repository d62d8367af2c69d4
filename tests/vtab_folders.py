"""Small tasks in VTAB-1k's folder format."""

from __future__ import annotations

import numpy as np
from PIL import Image


def write_task(folder, sizes=(6, 3, 4), classes=3, apart=False):
    """A task in VTAB's layout; the sizes of train800, val200 and test. apart: the 1,000 images lie there once more."""
    rng = np.random.default_rng(len(folder.name))
    parts = {}
    for split, size in zip(("train800", "val200", "test"), sizes, strict=True):
        (folder / "images" / split).mkdir(parents=True)
        parts[split] = [(f"images/{split}/{i:06d}.png", i % classes) for i in range(size)]
        for name, label in parts[split]:
            pixels = rng.integers(0, 90, (16, 16, 3), dtype=np.uint8)
            pixels[..., label % 3] += 130
            Image.fromarray(pixels).save(folder / name)
    parts["train800val200"] = parts["train800"] + parts["val200"]
    if apart:
        (folder / "images/train800val200").mkdir()
        copies = []
        for i, (name, label) in enumerate(parts["train800val200"]):
            copy = f"images/train800val200/{i:06d}.png"
            (folder / copy).write_bytes((folder / name).read_bytes())
            copies.append((copy, label))
        parts["train800val200"] = copies
    for split, samples in parts.items():
        (folder / f"{split}.txt").write_text("".join(f"{name} {label}\n" for name, label in samples))
    return folder
