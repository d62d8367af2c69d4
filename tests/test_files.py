"""Files from strangers are data: every damaged, hostile or foreign file is an error of our own."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hgprompt import files
from hgprompt.errors import FileFormatError, HGPromptError, OutputError
from hgprompt.files import make_directory, read_safetensors, write_bytes, write_safetensors, write_text

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float64)}


def _raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_round_trip_and_same_bytes(tmp_path):
    for name in ("x", "y"):
        write_safetensors(tmp_path / name, TENSORS, {"k": [1, "ä"], "a": None})
    tensors, metadata = read_safetensors(tmp_path / "x")
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())
    assert metadata == {"k": [1, "ä"], "a": None}
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["x", "y"]


def test_every_dtype_shape_and_layout_comes_back(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    tensors = {str(d): torch.arange(5).to(d) for d in (*dtypes, torch.int8, torch.uint8)} | {
        "bool": torch.tensor([True, False, True]), "number": torch.tensor(2.5), "empty": torch.zeros(3, 0),
        "transposed": torch.arange(6.0).view(2, 3).T, "parts": [torch.ones(2, 3), torch.zeros(1, 2).T, torch.zeros(0)],
    }  # fmt: skip
    for checksum in (False, True):
        write_safetensors(tmp_path / "x", tensors, {}, checksum=checksum)
        found, _ = read_safetensors(tmp_path / "x", checksum=checksum)
        expected = tensors | {"parts": torch.tensor([1.0] * 6 + [0.0] * 2)}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype


def test_a_checksum_is_asked_for_by_the_reader(tmp_path):
    write_safetensors(tmp_path / "without", TENSORS, {})
    with pytest.raises(FileFormatError, match="does not end with a checksum"):
        read_safetensors(tmp_path / "without", checksum=True)
    write_safetensors(tmp_path / "with", TENSORS, {}, checksum=True)
    content = bytearray((tmp_path / "with").read_bytes())
    content[-40] ^= 1  # of a tensor: nothing else could see it
    (tmp_path / "with").write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match="damaged"):
        read_safetensors(tmp_path / "with", checksum=True)
    read_safetensors(tmp_path / "with")


def test_file_of_another_program_has_no_metadata(tmp_path):
    save_file(TENSORS, tmp_path / "x")
    assert read_safetensors(tmp_path / "x")[1] == {}


HOSTILE = {
    "empty": b"",
    "short": b"\x01\x02",
    "header of 10 GB": struct.pack("<Q", 10 * 2**30) + b"{}",
    "header past the end": _raw({"a": _entry()}, b"\0" * 4, length=5000),
    "pickle": pickle.dumps({"a": 1}, protocol=4),
    "torch.save": b"PK\x03\x04" + b"\0" * 50,
    "text": b"this is not a tensor file at all, is it?",
    "no json": _raw(b"{not json}"),
    "list": _raw([1, 2]),
    "deep nesting": _raw(b"[" * 100_000),
    "duplicate keys": _raw(b'{"a": 1, "a": 2}'),
    "bad dtype": _raw({"a": _entry(dtype="F99")}, b"\0" * 4),
    "dtype is a list": _raw({"a": _entry(dtype=[])}, b"\0" * 4),
    "entry is a number": _raw({"a": 7}),
    "negative shape": _raw({"a": _entry(shape=(-1, -1))}, b"\0" * 4),
    "shape of floats": _raw({"a": _entry(shape=(1.0,))}, b"\0" * 4),
    "shape overflows": _raw({"a": _entry(shape=(2**40, 2**40))}, b"\0" * 4),
    "offsets reversed": _raw({"a": _entry(4, 0)}, b"\0" * 4),
    "overlap": _raw({"a": _entry(0, 4), "b": _entry(2, 6)}, b"\0" * 6),
    "gap": _raw({"a": _entry(0, 4), "b": _entry(8, 12)}, b"\0" * 12),
    "truncated data": _raw({"a": _entry(0, 400, (100,))}, b"\0" * 100),
    "trailing bytes": _raw({"a": _entry()}, b"\0" * 9),
    "metadata no json": _raw({"__metadata__": {"hgprompt": "{"}, "a": _entry()}, b"\0" * 4),
    "metadata is NaN": _raw({"__metadata__": {"hgprompt": '{"a": NaN}'}, "a": _entry()}, b"\0" * 4),
    "metadata is a list": _raw({"__metadata__": {"hgprompt": "[]"}, "a": _entry()}, b"\0" * 4),
    "metadata nests": _raw({"__metadata__": {"hgprompt": "[" * 50_000}, "a": _entry()}, b"\0" * 4),
    "metadata is a number": _raw({"__metadata__": {"hgprompt": 5}, "a": _entry()}, b"\0" * 4),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileFormatError, match=str(tmp_path)):
        read_safetensors(tmp_path / "x")


def test_pickles_are_refused_by_name(tmp_path):
    torch.save(TENSORS, tmp_path / "x")
    with pytest.raises(FileFormatError, match=r"pickle.*could run code"):
        read_safetensors(tmp_path / "x")


def test_limits_missing_files_and_folders(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "x", TENSORS, {})
    with pytest.raises(FileFormatError, match="over the limit of 10"):
        read_safetensors(tmp_path / "x", max_bytes=10)
    with pytest.raises(FileFormatError, match="the limit is 20"):
        read_safetensors(tmp_path / "x", max_header_bytes=20)
    monkeypatch.setattr(files, "MAX_TENSORS", 1)
    with pytest.raises(FileFormatError, match="2 tensors"):
        read_safetensors(tmp_path / "x")
    with pytest.raises(FileFormatError, match="does not exist"):
        read_safetensors(tmp_path / "y")
    with pytest.raises(FileFormatError, match="directory"):
        read_safetensors(tmp_path)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_mutated_files_never_surprise(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "x"
    write_safetensors(path, TENSORS, {"names": ["a"], "n": 1})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not content:
            content = bytearray(b"x")
    path.write_bytes(bytes(content))
    with contextlib.suppress(HGPromptError):
        read_safetensors(path)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    write_text(tmp_path / "x", "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
        write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "x", tmp_path / "file" / "x"):
        with pytest.raises(OutputError, match="cannot write"):
            write_text(path, "")
    with pytest.raises(OutputError, match="cannot make the directory"):
        make_directory(tmp_path / "file" / "sub")


def test_a_file_that_changes_while_it_is_read_is_read_as_it_was_opened(tmp_path, monkeypatch):
    """Checked and read through one descriptor: neither a swap nor what comes later reaches the tensors."""
    path = tmp_path / "x"
    write_safetensors(path, TENSORS, {})
    check = files._check_layout

    def swap(*arguments):
        check(*arguments)
        write_safetensors(path, {"other": torch.zeros(9)}, {})

    monkeypatch.setattr(files, "_check_layout", swap)
    tensors, _ = read_safetensors(path)
    assert tensors.keys() == TENSORS.keys()
    monkeypatch.setattr(files, "_check_layout", check)
    write_safetensors(path, TENSORS, {})
    tensors, _ = read_safetensors(path)
    os.truncate(path, 10)  # a memory map would now kill the process
    assert all(torch.equal(tensors[k], v) for k, v in TENSORS.items())

    def cut(*arguments):
        check(*arguments)
        os.truncate(path, os.path.getsize(path) - 5)

    write_safetensors(path, {"a": torch.zeros(100_000)}, {})  # more than is read ahead
    monkeypatch.setattr(files, "_check_layout", cut)
    with pytest.raises(FileFormatError, match="cut off"):
        read_safetensors(path)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, kind):
    if kind == "fifo":
        os.mkfifo(tmp_path / "x")
    else:
        (tmp_path / "x").symlink_to("/dev/zero")
    with pytest.raises(FileFormatError, match="not a regular file"):
        read_safetensors(tmp_path / "x")


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path):
    from safetensors.torch import load_file

    g = torch.Generator().manual_seed(0)
    wanted = {}
    for i, dtype in enumerate(files._DTYPES.values()):
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (3, 2, dtype.itemsize), generator=g)
        wanted[f"t{i}"] = raw.to(torch.uint8).view(dtype).squeeze(-1)
    wanted |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(wanted, tmp_path / "x")
    ours, theirs = read_safetensors(tmp_path / "x")[0], load_file(tmp_path / "x")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (ours[name], tensor)]
            assert torch.equal(*bits), name


def test_truth_values_are_0_or_1(tmp_path):
    (tmp_path / "x").write_bytes(_raw({"a": _entry(0, 2, (2,), "BOOL")}, b"\x01\x02"))
    with pytest.raises(FileFormatError, match="truth values"):
        read_safetensors(tmp_path / "x")


def test_a_header_of_many_values_takes_no_memory(tmp_path):
    """16 MB of empty objects would be a gigabyte of them: refused before the parser sees it."""
    import tracemalloc

    text = b'{"a":[' + b"{}," * (5 * 2**20) + b"0]}"
    (tmp_path / "x").write_bytes(_raw(text))
    tracemalloc.start()
    with pytest.raises(FileFormatError, match="values, over the limit"):
        read_safetensors(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text)


def test_names_of_files(tmp_path):
    """A name of 93 characters in UTF-8 has 250 bytes of the 255 that a file system allows; a temporary's has fewer."""
    name = "字" * 78 + ".safetensors"
    write_bytes(tmp_path / name, b"x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    for bad in ("a\0b", "a\ud800b"):
        with pytest.raises(OutputError, match="names no file"):
            write_bytes(tmp_path / bad, b"x")
    assert len(list(tmp_path.iterdir())) == 1
