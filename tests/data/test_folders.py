"""Image folders: both layouts, every kind of image, and files that are not what they should be."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from hgprompt.data import ImageDataset, load_task, make_loader
from hgprompt.data.folders import balanced
from hgprompt.data.picture import read_image
from hgprompt.errors import DataError, OptionError


def _image(path, size=(10, 8), colour=(255, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def _vtab(root, lines=None, n=6):
    for i in range(n):
        _image(root / "images" / "train" / f"{i}.png", colour=(40 * i, 0, 0))
    text = lines if lines is not None else "".join(f"images/train/{i}.png {i % 3}\n" for i in range(n))
    (root / "train800.txt").write_text(text)
    return root


def test_split_file(tmp_path):
    root = _vtab(tmp_path / "pets")
    (root / "classes.txt").write_text("cat\ndog\nbird\n")
    task = load_task(root, "train800")
    assert task.name == "pets"
    assert [label for _, label in task.samples] == [0, 1, 2, 0, 1, 2]
    assert task.class_names == ("cat", "dog", "bird")


def test_class_folders(tmp_path):
    for name in ("b", "a"):
        for i in range(2):
            _image(tmp_path / name / f"{i}.jpg")
    (tmp_path / "a" / "notes.md").write_text("not an image")
    task = load_task(tmp_path)
    assert task.class_names == ("a", "b")
    assert [(p.parent.name, label) for p, label in task.samples] == [("a", 0), ("a", 0), ("b", 1), ("b", 1)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "lists no images"),
        ("images/train/0.png\n", "line 1: expected"),
        ("images/train/0.png one\n", "line 1: expected"),
        ("images/train/0.png 1_0\n", "line 1: expected"),
        ("images/train/0.png 0\nimages/train/1.png -1\n", "line 2: label -1"),
        ("images/train/0.png 3\n", "label 3 is no class of 3"),
        ("images/train/9.png 0\n", "does not exist"),
        ("../secret.png 0\n", "may so lead out of"),
        ("/etc/hostname 0\n", "leads out of"),
        ("images/link.png 0\n", "leads out of"),
    ],
)
def test_bad_split_files(tmp_path, lines, message):
    root = _vtab(tmp_path / "task", lines)
    (root / "classes.txt").write_text("a\nb\nc\n")
    _image(tmp_path / "secret.png")
    (root / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=message):
        load_task(root, "train800")


def test_bad_folders(tmp_path):
    with pytest.raises(DataError, match="no folder"):
        load_task(tmp_path / "missing")
    with pytest.raises(DataError, match="neither split files"):
        load_task(tmp_path)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(DataError, match="empty_class holds no images"):
        load_task(tmp_path)
    with pytest.raises(DataError, match="no split 'test'; it has train800"):
        load_task(_vtab(tmp_path / "task"), "test")


def test_images_become_rgb(tmp_path):
    cases = {
        "grey.png": ("L", 128, (128,) * 3), "palette.png": ("P", 0, (0,) * 3), "one.png": ("1", 1, (255,) * 3),
        "clear.png": ("RGBA", (255, 0, 0, 0), (255,) * 3), "half.png": ("LA", (0, 128), (127,) * 3),
        "cmyk.jpg": ("CMYK", (0, 0, 0, 0), (255,) * 3),
    }  # fmt: skip
    for name, (mode, colour, expected) in cases.items():
        _image(tmp_path / name, mode=mode, colour=colour)
        assert np.abs(np.array(read_image(tmp_path / name))[0, 0].astype(int) - expected).max() <= 1, name
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.array(read_image(tmp_path / "deep.png"))[0, 0].tolist() == [128] * 3
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.array(read_image(tmp_path / "moving.gif"))[0, 0].tolist() == [255, 0, 0]
    picture = Image.new("RGB", (6, 2))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (2, 6)


def test_unreadable_and_absurd_images(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    _image(tmp_path / "whole.png", size=(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    for name in ("text.png", "cut.png"):
        with pytest.raises(DataError, match=f"{name} is no readable image"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="64×64 pixels, over the limit"):
        read_image(tmp_path / "whole.png", max_pixels=1000)
    _image(tmp_path / "bomb.png", size=(20_000, 20_000), mode="1", colour=0)
    with pytest.raises(DataError, match=r"bomb\.png is too large"):  # Pillow is the stricter
        read_image(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "missing.png")


def test_resized_without_the_aspect_and_not_normalised(tmp_path):
    _image(tmp_path / "x.png", size=(30, 10), colour=(1, 2, 3))
    image, label = ImageDataset([(tmp_path / "x.png", 4)], (8, 12))[0]
    assert (image.shape, image.dtype, label) == ((3, 8, 12), torch.uint8, 4)
    assert image[:, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(OptionError, match="interpolation"):
        ImageDataset([], (8, 8), interpolation="magic")


def test_loader_leaves_the_global_generators_alone(tmp_path):
    task = load_task(_vtab(tmp_path), "train800")
    before = torch.get_rng_state(), random.getstate()
    first, again = (list(make_loader(task, (8, 8), batch_size=4, shuffle=True, seed=1)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert [len(y) for _, y in first] == [4, 2]
    assert torch.equal(first[0][1], again[0][1])


def test_limit_takes_classes_in_turn(tmp_path):
    samples = [(tmp_path / str(i), 0 if i < 90 else i) for i in range(100)]
    chosen = balanced(samples, 22, seed=0)
    assert len(chosen) == 22
    assert sum(label == 0 for _, label in chosen) == 12
    assert list(chosen) == sorted(chosen, key=samples.index)
    assert chosen == balanced(samples, 22, seed=0)
    with pytest.raises(OptionError, match="limit"):
        balanced(samples, 0, seed=0)


def test_what_lies_beside_class_folders(tmp_path):
    """A README and a Mac's hidden files are no part of a task."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _image(tmp_path / name / "x.png")
        (tmp_path / name / "._x.png").write_bytes(b"resource fork")
    (tmp_path / "README.txt").write_text("Photographs of 2024\nby nobody in particular\n")
    assert len(load_task(tmp_path).samples) == 2


def test_pixels_of_unknown_range_are_refused(tmp_path):
    """A float image in 0 … 1 would come out black, one in 0 … 255 not: nobody can tell which it is."""
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif.*floating-point"):
        read_image(tmp_path / "x.tif")
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "y.tif")
    with pytest.raises(DataError, match=r"y\.tif.*32-bit"):
        read_image(tmp_path / "y.tif")


def test_a_task_that_is_the_working_directory_has_its_folders_name(tmp_path, monkeypatch):
    monkeypatch.chdir(_vtab(tmp_path / "task"))
    assert load_task(".", "train800").name == "task"


def test_lists_that_begin_with_a_byte_order_mark(tmp_path):
    root = _vtab(tmp_path / "task")
    (root / "classes.txt").write_text("cat\ndog\nfox\n", encoding="utf-8-sig")
    (root / "train800.txt").write_text("images/train/0.png 0\n", encoding="utf-8-sig")
    task = load_task(root, "train800")
    assert task.class_names == ("cat", "dog", "fox")
    assert [path.name for path, _ in task.samples] == ["0.png"]


def test_a_folder_above_the_task_is_guessed(tmp_path):
    for name in ("train/cat", "val/cat"):
        _image(tmp_path / name / "0.png")
    with pytest.raises(DataError, match=r"train holds no images .*but folders: is .*train itself the task"):
        load_task(tmp_path)


def test_an_error_of_a_decoding_process_is_one_line(tmp_path):
    from hgprompt.tuning.trainer import _batches

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _image(tmp_path / name / "x.png")
    (tmp_path / "b" / "x.png").write_bytes(b"no image")
    task = load_task(tmp_path)
    dataset = ImageDataset(task.samples, (8, 8))
    with pytest.raises(DataError, match="no readable image") as raised:
        list(_batches(dataset, torch.arange(2), 2, workers=1))
    assert "\n" not in str(raised.value)
