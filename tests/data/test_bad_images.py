"""Images that cannot be read: they stop the work, or are left out, counted and named."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from hgprompt.data import ImageDataset, LabelledImages, load_task, make_loader, open_images
from hgprompt.data.bad_images import BadOnes
from hgprompt.data.folders import _read_all
from hgprompt.errors import DataError, HGPromptWarning, OptionError


def _folder(root, bad=(), n=12):
    """n images of 3 classes, image i of colour 10 i; those of `bad` are damaged."""
    for i in range(n):
        path = root / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (10 * i, 0, 0)).save(path)
        if i in bad:
            path.write_bytes(b"no image")
    return load_task(root)


def _red(images):
    return [int(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize("max_bytes", [0, 10**9], ids=["on disk", "in memory"])
def test_open_images_leaves_out_and_says_so(tmp_path, max_bytes):
    task = _folder(tmp_path, bad=(0, 7))
    with pytest.warns(HGPromptWarning, match=r"skipped 2 of 12 images: .*00\.png is no readable image"):
        images = open_images(task, (4, 4), bad_images="skip", max_bytes=max_bytes)
    assert isinstance(images, LabelledImages if max_bytes else ImageDataset)
    assert len(images) == 10
    # Each image keeps its own label: by class a, b, c, and within a class in order.
    found = [(int(image[0, 0, 0]) // 10, int(label)) for image, label in (images[i] for i in range(10))]
    assert found == [(3, 0), (6, 0), (9, 0), (1, 1), (4, 1), (10, 1), (2, 2), (5, 2), (8, 2), (11, 2)]
    assert (images.skipped.count, images.skipped.total, len(images.skipped.first)) == (2, 12, 2)
    assert images.num_classes == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_s_batches_shrink(tmp_path, workers):
    task = _folder(tmp_path, bad=(0, 3, 7))  # the first two are the first batch of two
    whole = dict(zip((path.name for path, _ in task.samples), range(12), strict=True))
    loader = make_loader(task, (4, 4), batch_size=2, workers=workers, bad_images="skip")
    for _ in range(2):  # and so in every pass
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = list(loader)
        assert [str(w.message)[:24] for w in caught if w.category is HGPromptWarning] == ["skipped 3 of 12 images: "]
        assert loader.skipped.count == 3
        # Samples 0 and 1 are a whole batch, which does not appear; sample 6 (image 07) shrinks the one it is in.
        assert [len(labels) for _, labels in batches] == [2, 2, 1, 2, 2]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
        assert _red(torch.cat([images for images, _ in batches])) == [60, 90, 10, 40, 100, 20, 50, 80, 110]
    assert whole["07.png"] == 6


def test_numbers_are_those_of_the_images_that_are_left(tmp_path):
    """fast_ensemble over what is left equals fast_ensemble over a folder that never had the bad ones."""
    import literal

    from hgprompt import fast_ensemble

    rng = np.random.default_rng(0)
    for place, names in (("all", range(30)), ("good", (i for i in range(30) if i not in (4, 17)))):
        for i in names:
            path = tmp_path / place / "abc"[i % 3] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(path)
    for i in (4, 17):
        (tmp_path / "all" / "abc"[i % 3] / f"{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    prompts = torch.as_tensor(rng.standard_normal((3, 2, 16)), dtype=torch.float32)
    vit = literal.tiny_vit()
    skipping = make_loader(load_task(tmp_path / "all"), (16, 16), batch_size=7, bad_images="skip")
    with pytest.warns(HGPromptWarning, match="skipped 2 of 30"):
        ours = fast_ensemble(prompts, skipping, backbone=vit)
    theirs = fast_ensemble(prompts, make_loader(load_task(tmp_path / "good"), (16, 16), batch_size=7), backbone=vit)
    assert ours.n_images == theirs.n_images == 28
    # Batches are cut elsewhere: float32 features differ in their last bits, sums of them in another order too.
    torch.testing.assert_close(ours.source_h_scores, theirs.source_h_scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=0, atol=1e-4)


def test_stop_is_the_default(tmp_path):
    task = _folder(tmp_path, bad=(5,))
    for read in (lambda: open_images(task, (4, 4)), lambda: list(make_loader(task, (4, 4)))):
        with pytest.raises(DataError, match=r"05\.png is no readable image"):
            read()


def test_too_many_are_an_error(tmp_path):
    task = _folder(tmp_path / "half", bad=range(7))
    for read in (
        lambda: open_images(task, (4, 4), bad_images="skip"),
        lambda: open_images(task, (4, 4), bad_images="skip", max_bytes=0),
        lambda: list(make_loader(task, (4, 4), bad_images="skip")),
    ):
        with pytest.raises(DataError, match=r"skipped 7 of 12 .*More than 50 % cannot be read"):
            read()
    task = _folder(tmp_path / "class", bad=(1, 4, 7, 10))
    with pytest.raises(DataError, match="No image is left of class 1"):
        open_images(task, (4, 4), bad_images="skip")
    with pytest.raises(OptionError, match="bad_images"):
        make_loader(task, (4, 4), bad_images="ignore")


def test_a_long_list_is_cut(tmp_path):
    task = _folder(tmp_path, bad=range(0, 40, 2), n=60)
    with pytest.warns(HGPromptWarning, match="and 10 more"):
        images = open_images(task, (4, 4), bad_images="skip")
    assert len(images.skipped.first) == 10


def test_of_many_bad_images_little_is_kept_and_few_wait(tmp_path, monkeypatch):
    """20,000 images that are not there: their places, ten messages, and some 4,096 turns of decoders."""
    samples = [(tmp_path / "a", 0)] * 20_000
    waiting, most = set(), 0

    def read(path, max_pixels):
        raise DataError("x" * 1_000)

    submit = ThreadPoolExecutor.submit

    def counted(self, *args):
        nonlocal most
        future = submit(self, *args)
        waiting.add(future)
        most = max(most, len(waiting))
        future.add_done_callback(waiting.discard)
        return future

    monkeypatch.setattr("hgprompt.data.folders.read_image", read)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    bad = _read_all(ImageDataset(samples, (4, 4)), None, None)
    assert bad.places == set(range(20_000))
    assert [len(message) for message in bad.first] == [1_000] * 10
    assert most <= 5000  # those of a part, and some whose last word is on the way when the next part begins


def test_the_first_of_bad_images_are_the_first_of_the_list():
    bad = BadOnes()
    for place in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist():
        bad.add(place, f"image {place}")
    assert bad.first == tuple(f"image {i}" for i in range(10))


def test_nothing_to_skip_is_nothing_to_report(tmp_path):
    task = _folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_images(task, (4, 4), bad_images="skip").skipped is None
        loader = make_loader(task, (4, 4), bad_images="skip", batch_size=5, shuffle=True, seed=3)
        same = make_loader(task, (4, 4), batch_size=5, shuffle=True, seed=3)
        for (images, labels), (expected, theirs) in zip(loader, same, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, theirs)


@pytest.mark.parametrize("max_bytes", [0, 10**9], ids=["on disk", "in memory"])
def test_what_is_left_keeps_the_tasks_name_and_classes(tmp_path, max_bytes):
    for i in range(4):
        Image.new("RGB", (6, 5), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "train.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in range(4)))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    with pytest.warns(HGPromptWarning, match="skipped 1 of 4"):
        images = open_images(load_task(tmp_path, "train"), (4, 4), bad_images="skip", max_bytes=max_bytes)
    assert (images.name, images.class_names, images.num_classes) == (tmp_path.name, ("ant", "bee", "cat"), 3)
