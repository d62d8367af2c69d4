"""Decoding a task into memory, beside the DataLoader that reads the same files with as many workers as cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hgprompt.data import decode, load_task, make_loader
from hgprompt.data.folders import available_cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 JPEG files of 500 × 375 pixels, as photographs are: smooth, with some noise."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(100):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).resize((500, 375))
            pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-8, 9, (375, 500, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(root / label / f"{i}.jpg", quality=90)
    return root


def test_decode(paired, benchmark, folder):
    task = load_task(folder)

    def theirs():
        loader = make_loader(task, (224, 224), batch_size=32, workers=available_cores())
        return torch.cat([images for images, _ in loader])

    assert torch.equal(decode(task, (224, 224)).images, theirs())
    benchmark.group = "decoding 200 JPEGs"
    paired(lambda: decode(task, (224, 224)), theirs)
