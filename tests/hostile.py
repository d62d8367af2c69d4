"""Hostile files: makers of them, and what must survive them. Used by the tests and by benchmarks/fuzz.py.

A case is a few bytes. A target writes them where hgprompt reads such bytes, reads them, and uses what came of it; it
may succeed or raise an HGPromptError, and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hgprompt.data.listing import load_task
from hgprompt.data.picture import MAX_PIXELS, read_image
from hgprompt.files import read_safetensors, write_safetensors
from hgprompt.paper.cells import Cell, Store
from hgprompt.pool import BackboneInfo, PromptPool
from hgprompt.result import EnsembleResult
from hgprompt.strict_json import parse
from hgprompt.tuning import TuneConfig, TuneResult
from hgprompt.tuning.checkpoint import Checkpoint

MIB = 2**20
INFO = BackboneInfo("vit_tiny_patch16_224", "f" * 64, 6, 3, (32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic")
RUN = {"lr": [1.0], "images": "abc"}
LIKE = {"prompt": torch.zeros(2, 4, 6), "head.weight": torch.zeros(2, 3, 6), "step": torch.zeros(2)}
CELL = Cell("cell", {"task": "pets", "seed": [1, 2]}, lambda work: {})


def _pool(path: Path, deep: bool = False, dtype: torch.dtype = torch.float32) -> None:
    g = torch.Generator().manual_seed(1)
    shape = (3, 2, 6) if deep else (2, 6)
    prompts = {name: torch.randn(shape, generator=g).to(dtype) for name in ("cats", "dogs", "sea [bold]")}
    records = {"cats": {"task": "cats", "init_seed": 3, "training": {"epochs": 2, "lr": 0.5}}}
    metadata = {
        "format": "hgprompt-pool", "version": 1, "names": list(prompts), "backbone": INFO.to_dict(), "prompts": records,
    }  # fmt: skip
    write_safetensors(path, {f"prompts.{k}": v for k, v in prompts.items()}, metadata)


def _ensemble(folder: Path) -> None:
    m, numbers = 3, torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    EnsembleResult(
        weights=numbers / numbers.sum(), names=("a", "b", "c"), prompt=torch.randn(2, 6), h_score=1.2, h_score_std=0.1,
        alignment_loss=0.3, objective=-0.9, gap=1e-9, converged=True, source_h_scores=numbers,
        source_h_score_std=numbers.clone(), source_rank_std=numbers.clone(), uniform_h_score=1.0,
        gradient_cosines=torch.eye(m, dtype=torch.float64), weight_std=numbers.clone(), weight_error=float("nan"),
        stop_reason="end of data", n_images=40, n_classes=3, n_gradient_images=20, sample_h_score=1.0,
        sample_h_score_mixed_prompt=1.0, shrinkage_intensity=0.1, kept_bytes=100, classes=(0, 1, 2), lam=1.0,
        settings={"seed": 0, "solver": "newton"}, backbone=INFO,
    ).save(folder)  # fmt: skip


def _tuned(folder: Path) -> None:
    history = tuple(
        {"epoch": e, "lr": 0.1, "loss": [1.0, 2.0], "train_accuracy": [0.5, 0.6], "test_accuracy": [0.4, 0.3]}
        for e in (1, 2)
    )
    TuneResult(
        ("a", "b"), torch.randn(2, 4, 6), torch.randn(2, 3, 6), torch.zeros(2, 3), history, TuneConfig(epochs=2),
        "birds", ("owl", "wren", "tit"), INFO, 1.0,
    ).save(folder)  # fmt: skip


def _checkpoint(path: Path) -> None:
    record = {"epoch": 1, "lr": [0.1, 0.1], "loss": [1.0, None], "train_accuracy": [0.5, 0.0]}
    Checkpoint(path, RUN).write(LIKE, [record])


@functools.cache
def _seeds() -> dict[str, list[bytes]]:
    """Good files of each kind."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for i, options in enumerate(({}, {"deep": True}, {"dtype": torch.bfloat16}, {"dtype": torch.float64})):
            _pool(place / f"pool{i}", **options)
        _ensemble(place)
        _tuned(place)
        _checkpoint(place / "checkpoint")
        Store(place).directory.mkdir()
        Store(place).put(CELL, {"accuracy": [0.5, 0.25], "name": "x", "more": {"a": None}})
        read = lambda file: (place / file).read_bytes()  # noqa: E731
        return {
            "pool": [read(f"pool{i}") for i in range(4)],
            "ensemble": [read("ensemble.safetensors")],
            "tuned": [read("tuned.safetensors")],
            "checkpoint": [read("checkpoint")],
            "cell": [Store(place).path(CELL).read_bytes()],
            "image": _images(),
            "list": [
                b"a.png 0\nsub/b.jpg 1\n.//sub/./b.jpg 2\n\0cat\ndog\nbird\n",
                b"a.png\t0\r\n\r\n" + b"sub/b.jpg 1\n" * 50 + b"\0",
            ],
        }


def _images() -> list[bytes]:
    rng = random.Random(0)

    def noise(mode: str, size: tuple[int, int] = (17, 11)) -> Image.Image:
        bands = {"1": 1, "L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4, "I;16": 2}[mode]
        if mode in ("1", "P"):
            return Image.frombytes("L", size, rng.randbytes(size[0] * size[1])).convert(mode)
        return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * bands))

    made = []

    def add(image: Image.Image, kind: str, **options: Any) -> None:
        out = io.BytesIO()
        image.save(out, kind, **options)
        made.append(out.getvalue())

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"):
        add(noise(mode), "PNG")
    add(noise("P"), "PNG", transparency=3)
    add(noise("RGB"), "PNG", icc_profile=rng.randbytes(300), exif=exif.tobytes())
    add(noise("RGB"), "PNG", save_all=True, append_images=[noise("RGB"), noise("RGB")])
    for mode in ("L", "RGB", "CMYK"):
        add(noise(mode), "JPEG")
        add(noise(mode, (40, 33)), "JPEG", progressive=True, exif=exif.tobytes())
    add(noise("RGB"), "MPO", save_all=True, append_images=[noise("RGB")])
    add(noise("P"), "GIF")
    add(noise("P"), "GIF", save_all=True, append_images=[noise("P"), noise("P", (9, 20))], transparency=1)
    for mode in ("RGB", "RGBA"):
        add(noise(mode), "WEBP", lossless=True)
        add(noise(mode), "WEBP", quality=50, exif=exif.tobytes())
        add(noise(mode), "WEBP", save_all=True, append_images=[noise(mode)])
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        add(noise(mode), "BMP")
    for mode in ("1", "L", "RGB", "RGBA", "CMYK", "I;16"):
        add(noise(mode), "TIFF")
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate"):
        add(noise("RGB", (64, 48)), "TIFF", compression=compression)
    add(noise("1"), "TIFF", compression="group4")
    return made


NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 4095, 4097, 2**31, 2**63, -(2**63), 10**400, 1e308, -1e308, 1.5, -0.0,
    float("nan"), float("inf"), "", "a", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[31mred", "\x1b]0;title\x07",
    "\u202egnp", "\ud800", "[red]", "[/]", "[link=http://x.y]z", "\\", "$\\frac{a}$", "$x", "|", "=1+1", "a" * 300,
    "a" * 5000, [], {}, [0], [[]], {"a": {}}, [0] * 2000, {"name": "x"}, "cats", "dogs", "hf-hub:a/b", "tensor", "F32",
    "F64", "BF16", "F8_E4M3", "BOOL", "U8", "I64", "U16",
]  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one place in it changed."""
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, child in list(items):
            places.append((inner, key))
            walk(child)

    root = [value]
    try:
        walk(root)
    except RecursionError:  # changed so often that it is too deep to change: begin again
        root, places = [[]], []
        walk(root)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 3:
        holder[key] = copy.deepcopy(rng.choice(NASTY))
    elif kind == 3 and holder is not root:
        del holder[key]
    elif kind == 4:
        other, place = rng.choice(places)
        with contextlib.suppress(LookupError):
            holder[key] = json.loads(json.dumps(other[place]))
    elif kind == 5 and isinstance(holder, dict):
        holder[str(rng.choice(NASTY))] = holder.pop(key)
    elif kind == 6 and isinstance(holder[key], int):
        holder[key] = holder[key] + rng.choice((-1, 1, 2, 4, 1000, -holder[key] * 2))
    elif kind == 7:
        for _ in range(rng.choice((1, 10, 100))):
            holder[key] = [holder[key]]
    return root[0]


def mutate_bytes(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """The bytes with a few changes that know nothing of the format."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.5:  # headers are where it matters
            place = min(place, rng.randrange(120))
        size = rng.choice((1, 1, 2, 4, 16, 100))
        kind = rng.randrange(8)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + size] = rng.randbytes(size)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + size]
        elif kind == 4:
            data[place:place] = data[place : place + size] * rng.choice((1, 2, 50))
        elif kind == 5:
            number = rng.choice((0, 1, 0x7F, 0xFF, 0x100, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF))
            text = struct.pack(rng.choice(("<I", ">I")), number)
            text = text if rng.random() < 0.5 else struct.pack(rng.choice(("<H", ">H")), number & 0xFFFF)
            data[place : place + len(text)] = text
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[place : place + size] = other[start : start + size]
        else:
            data[place:place] = bytes([rng.choice((0, 255, rng.randrange(256)))]) * size
    return bytes(data)


def _safetensors(kind: str, rng: random.Random) -> bytes:
    """A file of tensors, changed in its metadata, its header, its data, or anywhere."""
    return _changed_safetensors(kind, rng.choice(_seeds()[kind]), rng)


def _changed_safetensors(kind: str, content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(content, rng, _seeds()[kind])
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
        metadata = json.loads(header["__metadata__"]["hgprompt"])
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError, struct.error):
        return mutate_bytes(content, rng, _seeds()[kind])
    for _ in range(rng.choice((1, 1, 2, 3))):
        what = rng.randrange(6)
        if what < 3:
            metadata = mutate_json(metadata, rng)
        elif what == 3:
            header = mutate_json(header, rng)
        elif what == 4 and data:
            value = rng.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 8, b"\x00" * 8, rng.randbytes(4)))
            place = rng.randrange(0, len(data), 4)
            data = data[:place] + value + data[place + len(value) :]
        elif what == 5 and isinstance(metadata, dict) and isinstance(header, dict):  # a name, wherever it stands
            old, new = "cats", rng.choice([n for n in NASTY if isinstance(n, str)])
            metadata = json.loads(json.dumps(metadata).replace(json.dumps(old), json.dumps(new)))
            header = {(f"prompts.{new}" if k == f"prompts.{old}" else k): v for k, v in header.items()}
    if isinstance(header, dict):
        header["__metadata__"] = {"hgprompt": json.dumps(metadata)} if rng.random() < 0.95 else metadata
    text = json.dumps(header).encode()
    length = len(text) if rng.random() < 0.97 else rng.choice((0, 1, len(text) - 1, len(text) + 1, 2**40, 2**63))
    return struct.pack("<Q", length) + text + data


def _cell(rng: random.Random) -> bytes:
    return _changed_json(_seeds()["cell"][0], rng)


def _changed_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(content, rng, _seeds()["cell"])
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return mutate_bytes(content, rng, _seeds()["cell"])
    for _ in range(rng.choice((1, 2, 3))):
        value = mutate_json(value, rng)
    return json.dumps(value).encode()


def _list(rng: random.Random) -> bytes:
    content = rng.choice(_seeds()["list"])
    if rng.random() < 0.3:
        return mutate_bytes(content, rng, _seeds()["list"])
    names = [
        "a.png", "sub/b.jpg", "sub/../a.png", "./sub/./b.jpg", "../secret.png", "link.png", "inner.png", "loop.png",
        "fifo.png", "sub", "", ".", "..", "/etc/hostname", "a.png/x", "x" * 300, "x" * 9000, "a\0.png", "\x1b[2J.png",
        "sub/" * 2000, "out/secret.png", "a.png\r", "\ufeffa.png", "missing.png",
    ]  # fmt: skip
    labels = ["0", "1", "2", "3", "-1", "99999", "100000", "1" * 5000, "1_0", "٣", "0x1", "1.0", "NaN", "", "+1"]
    lines = []
    for _ in range(rng.choice((1, 3, 20, 200))):
        good = rng.random() < 0.8
        lines.append(f"{rng.choice(names[:4] if good else names)} {rng.choice(labels[:3] if good else labels)}")
    classes = rng.choice(("", "cat\ndog\nbird\n", "c\n" * 300, "x" * 20_000, "\x1b[31m\n\u202e\n$x$\n"))
    return (rng.choice(("\n", "\r\n", "\r", "\n\n\n")).join(lines) + "\0" + classes).encode(errors="surrogatepass")


def _changed_list(content: bytes, rng: random.Random) -> bytes:
    return mutate_bytes(content, rng, _seeds()["list"])


def _image(rng: random.Random) -> bytes:
    return _changed_image(rng.choice(_seeds()["image"]), rng)


def _changed_image(content: bytes, rng: random.Random) -> bytes:
    content = _of_another_size(content, rng) if rng.random() < 0.1 else mutate_bytes(content, rng, _seeds()["image"])
    return with_right_crcs(content) if rng.random() < 0.8 else content


def _of_another_size(content: bytes, rng: random.Random) -> bytes:
    """An image whose header says another size, up to 2^31 pixels of a side; the coded pixels stay."""
    data = bytearray(content)
    width, height = (int(2 ** rng.uniform(0, rng.choice((8, 13, 16, 31)))) for _ in range(2))
    short = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    if content.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">II", width, height)
    elif content.startswith(b"BM"):
        data[18:26] = struct.pack("<ii", width, height * rng.choice((-1, 1)) if height < 2**31 else 1)
    elif content.startswith(b"GIF"):
        place = rng.choice((6, content.find(b"\x2c") + 5))
        data[place : place + 4] = short
    elif content.startswith(b"RIFF"):
        if content[12:16] == b"VP8X":
            data[24:30] = (width & 0xFFFFFF).to_bytes(3, "little") + (height & 0xFFFFFF).to_bytes(3, "little")
        else:
            data[26:30] = short
    elif content.startswith(b"\xff\xd8"):
        place = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2")) + 5
        data[place : place + 4] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif content.startswith(b"II"):
        for tag, value in ((256, width), (257, height)):
            place = content.find(struct.pack("<H", tag))
            data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, value)
    return bytes(data)


def with_right_crcs(content: bytes) -> bytes:
    """A PNG whose changed chunks have their check sums put right; anything else as it is."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    out, place = bytearray(content), 8
    while place + 12 <= len(out):
        (length,) = struct.unpack(">I", out[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[place + 4 : end]))
        place = end + 4
    return bytes(out)


def _json(rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        return _cell(rng)
    deep = rng.choice((b"[", b'{"a":')) * rng.choice((1, 63, 65, 10_000))
    return deep + rng.choice((b"", b"1", b'"\\ud800"', b"]" * 70))


# What reads them


def _shown(show: Callable[[], None], content: bytes) -> None:
    """Tables take milliseconds: drawn for one case in eight, always the same ones."""
    if zlib.crc32(content) % 8 == 0:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show()
        text = out.getvalue()
        # Nothing that steers a terminal comes through.
        assert all(c.isprintable() or c == "\n" for c in text), text


def _read_pool(place: Path, content: bytes) -> None:
    from hgprompt.cli import show

    (place / "pool").write_bytes(content)
    pool = PromptPool.load(place / "pool")
    assert bool(pool.stack().isfinite().all())
    assert all(name.isprintable() and name for name in pool)
    repr(pool)
    _shown(lambda: show.print_pool(pool), content)
    if zlib.crc32(content) % 8 == 1:
        pool.save(place / "again")
        assert PromptPool.load(place / "again").names == pool.names


def _read_ensemble(place: Path, content: bytes) -> None:
    from hgprompt.cli import show

    (place / "ensemble.safetensors").write_bytes(content)
    result = EnsembleResult.load(place)
    assert abs(float(result.weights.sum()) - 1) < 1e-2
    str(result)
    with contextlib.redirect_stdout(io.StringIO()):
        show.print_json(show.ensemble_numbers(result))
    _shown(lambda: show.print_ensemble(result, place.name), content)
    if zlib.crc32(content) % 8 == 1:
        result.save(place / "again")
        assert EnsembleResult.load(place / "again").names == result.names


def _read_tuned(place: Path, content: bytes) -> None:
    from hgprompt.cli import show

    (place / "tuned.safetensors").write_bytes(content)
    result = TuneResult.load(place)
    for name in result.names:
        result.accuracy(name)
        result.prompt(name)
    _shown(lambda: show.print_tuned(result), content)
    if zlib.crc32(content) % 8 == 1:
        result.save(place / "again")
        assert TuneResult.load(place / "again").names == result.names


def _read_checkpoint(place: Path, content: bytes) -> None:
    (place / "checkpoint").write_bytes(content)
    tensors, history = Checkpoint(place / "checkpoint", RUN).read(LIKE)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in LIKE.items()}
    [loss is None for loss in history[-1]["loss"]] if history else None


def _read_cell(place: Path, content: bytes) -> None:
    store = Store(place)
    store.directory.mkdir(exist_ok=True)
    store.path(CELL).write_bytes(content)
    assert isinstance(store.get(CELL), dict)


def _read_list(place: Path, content: bytes) -> None:
    """A split file and the class names of a folder that has traps in it."""
    folder = place / "folder"
    if not folder.exists():
        (folder / "sub").mkdir(parents=True)
        for path in (folder / "a.png", folder / "sub" / "b.jpg", place / "secret.png"):
            path.write_bytes(_seeds()["image"][1])
        (folder / "link.png").symlink_to("../secret.png")
        (folder / "inner.png").symlink_to("sub/b.jpg")
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "out").symlink_to(place)
        os.mkfifo(folder / "fifo.png")
    lines, _, classes = content.partition(b"\0")
    (folder / "train.txt").write_bytes(lines)
    (folder / "classes.txt").unlink(missing_ok=True)
    if classes:
        (folder / "classes.txt").write_bytes(classes)
    task = load_task(folder, "train")
    assert task.name.isprintable()
    assert all(name.isprintable() for name in task.class_names or ())
    real = os.path.realpath(folder) + os.sep
    for path, label in task.samples:
        assert os.path.realpath(path).startswith(real)
        assert 0 <= label < task.num_classes


def _read_image(place: Path, content: bytes) -> None:
    (place / "image").write_bytes(content)
    image = read_image(place / "image")
    assert image.mode == "RGB"
    assert 0 < image.size[0] * image.size[1] <= MAX_PIXELS


def _read_tensors(place: Path, content: bytes) -> None:
    (place / "tensors").write_bytes(content)
    tensors, _ = read_safetensors(place / "tensors")
    # Every byte of the file's data is in one tensor, and no tensor has more.
    (length,) = struct.unpack("<Q", content[:8])
    assert sum(t.numel() * t.itemsize for t in tensors.values()) == len(content) - 8 - length


def _read_json(place: Path, content: bytes) -> None:
    with contextlib.suppress(ValueError):  # which is what it says
        json.dumps(parse(content), allow_nan=False, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Target:
    """What reads hostile bytes.

    Attributes:
        kind: of the good files to begin with. make: a hostile file. change: a file, once more.
        read: into a folder, from there, and used.
        limit: bytes that may be allocated for a file of so many bytes, the reading program's own buffers included.
    """

    kind: str
    make: Callable[[random.Random], bytes]
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, bytes], None]
    limit: Callable[[int], int]

    def seeds(self) -> list[bytes]:
        """Good files."""
        return _seeds()[self.kind]


def _of_a_file(size: int) -> int:
    """Values of JSON take up to 75 times their text; the rest is what Rich and PyTorch load when first used."""
    return 128 * MIB + 100 * size


def _of_an_image(size: int) -> int:
    return 24 * MAX_PIXELS + 2 * size + 64 * MIB


def _of_tensors(kind: str, read: Callable[[Path, bytes], None]) -> Target:
    return Target(
        kind, functools.partial(_safetensors, kind), functools.partial(_changed_safetensors, kind), read, _of_a_file
    )


TARGETS = {
    "pool": _of_tensors("pool", _read_pool),
    "ensemble": _of_tensors("ensemble", _read_ensemble),
    "tuned": _of_tensors("tuned", _read_tuned),
    "checkpoint": _of_tensors("checkpoint", _read_checkpoint),
    "tensors": _of_tensors("pool", _read_tensors),
    "cell": Target("cell", _cell, _changed_json, _read_cell, _of_a_file),
    "json": Target("cell", _json, _changed_json, _read_json, _of_a_file),
    "list": Target("list", _list, _changed_list, _read_list, _of_a_file),
    "image": Target("image", _image, _changed_image, _read_image, _of_an_image),
}
