"""Folders and images that were made to do harm."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from hgprompt.data import listing, load_task, picture
from hgprompt.data.folders import balanced
from hgprompt.data.picture import read_image
from hgprompt.errors import DataError


def _png(path, size=(4, 4), colour=(9, 8, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


# Lists


@pytest.mark.parametrize("name", ["train.txt", "classes.txt"])
def test_a_line_without_an_end(tmp_path, name):
    """20 MB in one line: refused with less memory than that."""
    _png(tmp_path / "a.png")
    (tmp_path / "train.txt").write_text("a.png 0\n")
    (tmp_path / name).write_bytes(b"x" * 20_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{name}, line 1 is longer than 10000"):
        load_task(tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_more_lines_classes_or_things_than_allowed(tmp_path, monkeypatch):
    _png(tmp_path / "a.png")
    (tmp_path / "train.txt").write_text("a.png 0\n\n\na.png 0\n")
    monkeypatch.setattr(listing, "MAX_SAMPLES", 3)
    with pytest.raises(DataError, match="more than 3 lines"):
        load_task(tmp_path, "train")
    (tmp_path / "train.txt").unlink()
    for i in range(4):
        _png(tmp_path / "class" / f"{i}.png")
    with pytest.raises(DataError, match=r"class holds more than 3 things"):
        load_task(tmp_path)


def test_a_million_classes(tmp_path, monkeypatch):
    """As names, as labels, and (with a smaller limit: folders are slow to make) as folders."""
    _png(tmp_path / "a.png")
    (tmp_path / "train.txt").write_text("a.png 999999\n")
    with pytest.raises(DataError, match="label 999999 is no class of at most 100000"):
        load_task(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(1_000_000))))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"classes.txt has more than 100000 lines"):
        load_task(tmp_path, "train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000  # 100,000 short texts of 60 bytes, and the list of them
    monkeypatch.setattr(listing, "MAX_CLASSES", 50)
    for i in range(60):
        (tmp_path / "folders" / str(i)).mkdir(parents=True)
    with pytest.raises(DataError, match="more than 50 folders"):
        load_task(tmp_path / "folders")


def test_taking_turns_among_many_classes_takes_no_longer():
    """100,000 classes, one of which has 100,000 images: turn by turn, that would be 10^10 looks."""
    samples = [(None, i) for i in range(100_000)] + [(None, 0)] * 100_000
    chosen = balanced(samples, 150_000, seed=0)
    assert len({label for _, label in chosen}) == 100_000
    assert len(chosen) == 150_000


def test_labels_up_to_a_million_in_a_loader():
    """Statistics are kept of the classes that were seen, not of all that a label could mean."""
    import literal

    from hgprompt import fast_ensemble

    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4 * 333_333
    images = torch.randn(40, 3, 16, 16, generator=g)
    result = fast_ensemble(torch.randn(2, 2, 16, generator=g), [(images, labels)], backbone=literal.tiny_vit())
    assert result.classes == (0, 333_333, 666_666, 999_999)
    assert result.kept_bytes < 1_000_000


def test_links_that_lead_out(tmp_path):
    root = tmp_path / "root"
    _png(tmp_path / "secret" / "x.png")
    _png(root / "cats" / "1.png")
    _png(root / "dogs" / "1.png")
    (root / "dogs" / "2.png").symlink_to(root / "cats" / "1.png")  # inside: allowed
    assert len(load_task(root).samples) == 3
    (root / "dogs" / "3.png").symlink_to(tmp_path / "secret" / "x.png")
    with pytest.raises(DataError, match=r"3\.png is a link that leads out of .*follow_links=True"):
        load_task(root)
    assert len(load_task(root, follow_links=True).samples) == 4
    (root / "dogs" / "3.png").unlink()
    (root / "fish").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="leads out of"):
        load_task(root)
    (root / "fish").unlink()
    for line in ("fish/x.png 0", "cats/../../secret/x.png 0", f"{tmp_path}/secret/x.png 0", "loop/x.png 0"):
        (root / "fish").symlink_to(tmp_path / "secret")
        (root / "loop").symlink_to("loop")
        (root / "train.txt").write_text(line)
        with pytest.raises(DataError, match=r"line 1: .*(leads? out of|does not exist)"):
            load_task(root, "train")
        (root / "fish").unlink()
        (root / "loop").unlink()
    (tmp_path / "passwords").write_text("root\n")
    (root / "train.txt").write_text("cats/1.png 0")
    (root / "classes.txt").symlink_to(tmp_path / "passwords")
    with pytest.raises(DataError, match=r"classes\.txt is a link that leads out"):
        load_task(root, "train")


def test_many_ways_to_one_file_take_no_more_memory_than_one(tmp_path, monkeypatch):
    """Each line another chain of links: what is known of their folders is forgotten, and only the paths stay."""
    _png(tmp_path / "x.png")
    for name in "ab":
        (tmp_path / name).symlink_to(".")
    ways = ["".join("a/" if i >> k & 1 else "b/" for k in range(9)) for i in range(400)]
    (tmp_path / "train.txt").write_text("".join(f"{way}x.png 0\n" for way in ways))
    monkeypatch.setattr(listing, "_MAX_KNOWN", 10)
    tracemalloc.start()
    task = load_task(tmp_path, "train")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.samples) == 400
    # Beside the samples: the ten folders, the file's buffers. A folder kept for each would be another 400 bytes a line.
    assert peak < kept + 400 * 150


@pytest.mark.parametrize(("line", "message"), [("d/../x.png", "'..' in it"), ("d/" * 33 + "x.png", "32 folders deep")])
def test_roundabout_paths_are_refused(tmp_path, line, message):
    _png(tmp_path / "x.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "train.txt").write_text(f"{line} 0\n")
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        load_task(tmp_path, "train")
    if ".." in line:  # in a folder of one's own
        assert len(load_task(tmp_path, "train", follow_links=True).samples) == 1


def test_a_link_to_the_folder_itself_is_no_link_out(tmp_path):
    _png(tmp_path / "data" / "a" / "1.png")
    (tmp_path / "link").symlink_to("data")
    assert len(load_task(tmp_path / "link").samples) == 1


def test_names_of_folders_do_not_steer_a_terminal(tmp_path):
    _png(tmp_path / "task\x1b[2J" / "cat\u202e" / "1.png")
    _png(tmp_path / "task\x1b[2J" / "dog" / "1.png")
    task = load_task(tmp_path / "task\x1b[2J")
    assert task.name == "task�[2J"
    assert task.class_names == ("cat�", "dog")


# Images


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to a fifo"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    with pytest.raises(DataError, match=r"x\.png is (not a regular file|a directory)"):
        read_image(path)


def test_only_the_decoders_that_are_named(tmp_path):
    """PostScript would start a program, other formats have decoders that nobody needs."""
    for kind in ("EPS", "PPM", "TGA", "ICO", "PCX", "DDS", "JPEG2000"):
        out = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(out, kind)
        (tmp_path / "x.png").write_bytes(out.getvalue())
        with pytest.raises(DataError, match=r"its content is none of PNG, JPEG"):
            read_image(tmp_path / "x.png")


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_bytes(width, height, *chunks, rows=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [_chunk(b"IHDR", head), *chunks, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_compressed_texts_do_not_unfold(tmp_path):
    """100 MB of text and of a colour profile in 100 KB of file: no text is unfolded beyond Pillow's megabyte."""
    bomb = zlib.compress(b"a" * 100_000_000, 9)
    for chunk in (_chunk(b"zTXt", b"k\0\0" + bomb), _chunk(b"iCCP", b"p\0\0" + bomb)):
        (tmp_path / "x.png").write_bytes(_png_bytes(2, 2, chunk, rows=b"\0ab\0cd"))
        tracemalloc.start()
        with contextlib.suppress(DataError):
            assert read_image(tmp_path / "x.png").size == (2, 2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000


@pytest.mark.parametrize("size", [(2**16, 2**16), (2**31 - 1, 2**31 - 1), (1, 2**30), (8193, 8193)])
def test_bombs_are_refused_by_their_header(tmp_path, size):
    (tmp_path / "x.png").write_bytes(_png_bytes(*size))
    with pytest.raises(DataError, match=r"pixels, over the limit|too large|no readable image"):
        read_image(tmp_path / "x.png")


def test_a_webp_canvas_is_refused_before_it_is_made(tmp_path, monkeypatch):
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(out.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (16_000).to_bytes(3, "little") * 2
    (tmp_path / "x.webp").write_bytes(data)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the decoder was reached"))
    with pytest.raises(DataError, match="16001×16001 pixels, over the limit"):
        read_image(tmp_path / "x.webp")


def test_a_jpeg_of_many_scans(tmp_path):
    """A scan of ten bytes is a pass over all pixels: 1,000 of them in 20 KB would decode for a minute."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    for scans in (50, 200):
        (tmp_path / "x.jpg").write_bytes(data[:-2] + last * scans + data[-2:])
        if scans == 50:
            assert read_image(tmp_path / "x.jpg").size == (64, 64)
        else:
            with pytest.raises(DataError, match=r"a JPEG of 2\d\d scans"):
                read_image(tmp_path / "x.jpg")


def test_a_file_over_the_limit(tmp_path, monkeypatch):
    _png(tmp_path / "x.png")
    monkeypatch.setattr(picture, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(DataError, match="over the limit of 10"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_the_nearest_and_in_little_memory(tmp_path, kind):
    """Every value, against round(v / 257) in float64; and 4 million pixels in less than float64 would take."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / "x", kind)
    found = np.asarray(read_image(tmp_path / "x"))
    assert np.array_equal(found[..., 0], np.round(values.astype(np.float64) / 257).astype(np.uint8))
    Image.fromarray(np.full((2048, 2048), 4000, np.uint16)).save(tmp_path / "y", kind)
    tracemalloc.start()
    read_image(tmp_path / "y")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # NumPy's arrays (Pillow's own memory is not seen): 2 bytes in, 1 byte out, their copies as bytes, 256 rows at work.
    assert peak < 8 * 2048 * 2048


@pytest.mark.parametrize("frames", [2, 300])
def test_of_an_animation_one_frame_is_decoded(tmp_path, frames):
    pictures = [Image.new("P", (40, 40), i % 250) for i in range(frames)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        pictures[0].save(tmp_path / "x", kind, save_all=True, append_images=pictures[1:], duration=10)
        image = read_image(tmp_path / "x")
        assert (image.size, image.mode) == ((40, 40), "RGB")
