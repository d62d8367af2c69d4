"""LabelledImages, and decoding a folder into it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hgprompt.data import LabelledImages, decode, load_task, make_loader
from hgprompt.errors import DataError


def _set(n=7, classes=("a", "b", "c")):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    return LabelledImages("set", images, torch.arange(n) % 3, classes)


def test_is_a_dataset():
    images = _set()
    assert len(images) == 7
    assert images.num_classes == 3
    batch, labels = next(iter(DataLoader(images, batch_size=4)))
    assert torch.equal(batch, images.images[:4])
    assert labels.tolist() == [0, 1, 2, 0]
    assert [len(b) for b, _ in images.batches(3)] == [3, 3, 1]
    assert images.subset(torch.tensor([6, 0])).labels.tolist() == [0, 0]
    assert _set(classes=None).num_classes == 3


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), None, "uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), None, r"int64 \[2\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b"), "from 0 to 2"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, -1]), None, "from -1"),
    ],
)
def test_refuses_what_does_not_fit(images, labels, names, message):
    with pytest.raises(DataError, match=message):
        LabelledImages("set", images, labels, names)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_decoded_images_are_the_loaders(folder):
    task = load_task(folder)
    seen = []
    decoded = decode(task, (16, 16), limit=7, seed=1, report=lambda done, total: seen.append((done, total)))
    batches = list(make_loader(task, (16, 16), limit=7, seed=1))
    assert torch.equal(decoded.images, torch.cat([b for b, _ in batches]))
    assert torch.equal(decoded.labels, torch.cat([y for _, y in batches]))
    assert decoded.class_names == ("left", "right")
    assert seen[-1] == (7, 7)


def test_decode_says_what_does_not_fit_or_cannot_be_read(folder):
    with pytest.raises(DataError, match="10 images of 16×16 take"):
        decode(load_task(folder), (16, 16), max_bytes=1000)
    (folder / "left" / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png is no readable image"):
        decode(load_task(folder), (16, 16))


def test_vtab_aliases(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "train800.txt").write_text("x.png 0\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "cifar" / "x.png")
    assert load_task(tmp_path / "cifar100", "train800").name == "cifar"
    with pytest.raises(DataError, match="no folder"):
        load_task(tmp_path / "oxford_pet", "train800")
