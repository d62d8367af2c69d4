"""Reading and writing files: the one place that does. What is read is data from strangers, never code.

Written files appear whole or not at all (temporary name, then rename). Read files are opened once and checked before
anything is allocated for them; tensors are then read from the same descriptor, so that what was checked is what is
read, and nothing that happens to the file later reaches them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hgprompt import strict_json
from hgprompt.errors import FileFormatError, OutputError

MAX_FILE_BYTES = 8 * 2**30
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 200_000
_METADATA_KEY = "hgprompt"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM = "sha256"
_BLOCK = 2**20
_SUFFIX = ".tmp"
_MAX_DIMENSIONS = 16


def file_name(key: str, longest: int = 100) -> str:
    """A name that every file system takes, and no two keys share; of up to nine characters more than `longest`."""
    plain = re.sub(r"^\.|[^\w.-]", "_", key)[:longest]  # no leading dot: ".." would be the folder above
    return plain if plain == key else f"{plain}-{zlib.crc32(key.encode()):08x}"


def make_directory(path: str | Path) -> Path:
    """Make a directory and its parents if they are missing; OutputError where that fails, or where none can write."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the directory {path}: {error.strerror or error}; choose another") from error
    check_writable(path)
    return path


def check_writable(directory: Path) -> None:
    """Raise OutputError where no file can be made: before the work, and not after it."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OutputError(f"cannot write into {directory}: {error.strerror or error}; choose another place") from error


@contextlib.contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """`make_directory`, and where the block fails before anything was written, the new directory is gone again."""
    path = Path(path)
    new = not path.exists()
    make_directory(path)
    try:
        yield path
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # it is not empty: what is there stays
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process is in such a block for a file of the same directory (where the file system has locks)."""
    import fcntl

    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def differences(then: Any, now: Any) -> str:
    """What differs between two identities that came from JSON: the names, and the values where they say something."""
    words: dict[str, None] = {}

    def compare(name: str, old: Any, new: Any) -> None:
        if old == new:
            return
        if isinstance(old, dict) and isinstance(new, dict):
            for key in sorted({*old, *new}):
                compare(key if key in new else ascii(key)[:50], old.get(key), new.get(key))
        elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(new[0], dict):
            for one, other in zip(old, new, strict=True):
                compare(name, one, other)
        else:
            known = f"{name}, {json.dumps(old)} and not {json.dumps(new)}"
            words[known if len(known) < 100 else name] = None

    compare("all", then, now)
    return "; ".join(words)[:1000]


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        OutputError: the file cannot be written; what was there before stays.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all; OutputError as for `write_text`."""
    with _replacing(Path(path)) as file:
        file.write(content)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    metadata: Mapping[str, Any],
    *,
    checksum: bool = False,
) -> None:
    """Write tensors and JSON metadata into a safetensors file, whole or not at all; same input, same bytes.

    Tensor after tensor goes to the disk: memory for a second copy is needed of one at a time, and only where it is on
    a GPU or not contiguous.

    Args:
        tensors: by name. A sequence of tensors of one dtype becomes one flat tensor, one behind the other.
        checksum: end the file with a SHA-256 of all before it, for `read_safetensors` to check.

    Raises:
        OutputError: the file cannot be written; what was there before stays.
    """
    parts = {name: [value] if isinstance(value, Tensor) else list(value) for name, value in tensors.items()}
    # The widest numbers come first, so that all are aligned; the checksum is the last of the bytes.
    order = sorted(parts, key=lambda name: (-parts[name][0].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {_METADATA_KEY: json.dumps(metadata, allow_nan=False, sort_keys=True)}}
    end = 0
    for name in order:
        first, begin = parts[name][0], end
        end += sum(part.numel() for part in parts[name]) * first.element_size()
        whole = tensors[name]
        shape = list(whole.shape) if isinstance(whole, Tensor) else [(end - begin) // first.element_size()]
        header[name] = {"dtype": _DTYPE_NAMES[first.dtype], "shape": shape, "data_offsets": [begin, end]}
    if checksum:
        header[_CHECKSUM] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blocks: Iterable[bytes | memoryview] = itertools.chain(
        (struct.pack("<Q", len(text)), text), (bytes_of(part) for name in order for part in parts[name])
    )
    digest = hashlib.sha256()
    with _replacing(Path(path)) as file:
        for block in blocks:
            file.write(block)
            if checksum:
                digest.update(block)
        if checksum:
            file.write(digest.digest())


def bytes_of(tensor: Tensor) -> memoryview:
    """The numbers of a tensor as they lie in memory, row by row; a copy only of what is on a GPU or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of_tensors(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def read_safetensors(
    path: str | Path,
    *,
    max_bytes: int = MAX_FILE_BYTES,
    max_header_bytes: int = MAX_HEADER_BYTES,
    checksum: bool = False,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file.

    Args:
        path: the file; of any origin.
        max_bytes, max_header_bytes: what the file may hold at most.
        checksum: it must end with that of `write_safetensors`, which finds damage, not forgery.
        check: called with the metadata when only the header has been read; what it raises goes on. So a file that is
            not wanted costs no more than its header.

    Returns:
        The tensors by name, and what `write_safetensors` took as metadata ({} for files of other programs).

    Raises:
        FileFormatError: missing, no regular file, too large, truncated, a pickle, or inconsistent in any way.

    Tensors take the file's bytes in memory, once; the header and the metadata what `hgprompt.strict_json` says.
    """
    path = Path(path)
    with open_regular(path, max_bytes) as file:
        try:
            header, start = _read_header(path, file, max_header_bytes)
            metadata = _metadata(path, header)
            if check is not None:
                check(metadata)
            if checksum:
                _check_checksum(path, file, header, start)
                del header[_CHECKSUM]
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            return {name: _read_tensor(path, file, name, entry, start) for name, entry in entries.items()}, metadata
        except OSError as error:
            raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: str | Path, *, max_bytes: int) -> Any:
    """The value of a JSON file of any origin, with the limits of `hgprompt.strict_json`.

    Raises:
        FileFormatError: missing, no regular file, too large, or no such JSON.
    """
    path = Path(path)
    with open_regular(path, max_bytes) as file:
        try:
            return strict_json.parse(file.read(max_bytes))
        except (OSError, ValueError, RecursionError) as error:
            raise FileFormatError(f"{path} is no JSON that can be read ({error!s:.200})") from error


@contextlib.contextmanager
def open_regular(path: str | Path, max_bytes: int) -> Iterator[BinaryIO]:
    """A regular file, open for reading: a FIFO or a terminal in its place is refused, and not waited for.

    Raises:
        FileFormatError: missing, not readable, no regular file, or over `max_bytes`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist") from error
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a name with a NUL, or with half of a surrogate pair
        raise FileFormatError(f"{str(path)!r:.200} names no file ({error})") from error
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):  # which os.fdopen would not take
            raise FileFormatError(f"{path} is a directory, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise FileFormatError(f"{path} is not a regular file")
        if found.st_size > max_bytes:
            raise FileFormatError(f"{path} is {found.st_size} bytes, over the limit of {max_bytes}")
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        yield file


def remove_temporaries(path: Path) -> None:
    """Delete what killed writers of this file have left beside it."""
    for left in path.parent.glob(f"{glob.escape(_temporary(path))}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            left.unlink()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place once the block has ended well."""
    try:
        name = path.with_name(f"{_temporary(path)}{secrets.token_hex(8)}{_SUFFIX}")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except ValueError as error:  # a name with a NUL, or with half of a surrogate pair
        raise OutputError(f"cannot write {str(path)!r:.200}: it names no file ({error})") from error
    except OSError as error:
        hint = "" if path.parent.is_dir() else f" ({path.parent} is no directory)"
        raise OutputError(f"cannot write {path}: {error.strerror or error}{hint}; choose another place") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:  # also KeyboardInterrupt: nothing half-written stays
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
        raise


def _temporary(path: Path) -> str:
    """How the names of this file's temporaries begin: short enough for any file system, and those of no other file."""
    return f".{path.name[:24]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}."


def _check_checksum(path: Path, file: BinaryIO, header: dict[str, Any], start: int) -> None:
    entry = header.get(_CHECKSUM, {})
    left = os.fstat(file.fileno()).st_size - 32
    data = left + 32 - start
    if entry != {"dtype": "U8", "shape": [32], "data_offsets": [data - 32, data]}:
        raise FileFormatError(f"{path} does not end with a checksum")
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    if file.read(32) != digest.digest():
        raise FileFormatError(f"{path} is damaged: its checksum is not that of its content")


def _read_header(path: Path, file: BinaryIO, max_header_bytes: int) -> tuple[dict[str, Any], int]:
    """The checked header, and where the tensors' bytes begin."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    # The first eight bytes are a length and may be anything; a header opens with a brace, a pickle never has one there.
    if start[8:] != b"{" and (start[:1] == b"\x80" or start[:2] == b"PK"):
        raise FileFormatError(
            f"{path} is a pickle (torch.save): loading it could run code, so it is refused; load it where you trust "
            "it, and save the tensors with safetensors.torch.save_file"
        )
    if len(start) < 8:
        raise FileFormatError(f"{path} is truncated: {size} bytes hold no safetensors header")
    (length,) = struct.unpack("<Q", start[:8])
    file.seek(8)
    if length > max_header_bytes or length > size - 8:
        raise FileFormatError(
            f"{path} is no safetensors file, or truncated: its first bytes claim a header of {length} bytes, where the "
            f"file has {size} (and the limit is {max_header_bytes})"
        )
    try:
        header = strict_json.parse(file.read(length))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no safetensors file: its header is no valid JSON ({error!s:.200})") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path} is no safetensors file: its header is no JSON object")
    _check_layout(path, header, size - 8 - length)
    return header, 8 + length


def _read_tensor(path: Path, file: BinaryIO, name: str, entry: dict[str, Any], start: int) -> Tensor:
    """A tensor in memory of its own; `_check_layout` has seen its entry. Files are little-endian, and so are we."""
    tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="cpu")
    if tensor.numel():
        content = tensor.reshape(-1).view(torch.uint8)
        file.seek(start + entry["data_offsets"][0])
        if file.readinto(content.numpy()) != content.numel():  # type: ignore[attr-defined]
            raise FileFormatError(f"{path} was cut off while it was read: write files whole, or copy it first")
        if tensor.dtype == torch.bool and int(content.max()) > 1:
            raise FileFormatError(f"{path}: tensor {name[:80]!r} is of truth values, and has others")
    return tensor


def _check_layout(path: Path, header: dict[str, Any], num_bytes: int) -> None:
    """Every tensor where its shape says, without gap or overlap, up to the end of the file."""
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if len(entries) > MAX_TENSORS:
        raise FileFormatError(f"{path} holds {len(entries)} tensors, over the limit of {MAX_TENSORS}")
    spans = []
    for name, entry in entries.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            sizes = [*shape, begin, end]
            valid = len(shape) <= _MAX_DIMENSIONS and all(type(s) is int and 0 <= s < 2**63 for s in sizes)
            valid = valid and end - begin == math.prod(shape) * _DTYPES[dtype].itemsize
            # Of an empty tensor too, PyTorch multiplies the sizes in 64 bits.
            valid = valid and math.prod(max(s, 1) for s in shape) < 2**60
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: tensor {name[:80]!r} is described wrongly ({error!r:.80})") from error
        if not valid:
            raise FileFormatError(f"{path}: tensor {name[:80]!r} does not take the bytes that its shape needs")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise FileFormatError(f"{path}: tensors overlap or leave a gap at byte {position}")
        position = end
    if position != num_bytes:
        raise FileFormatError(f"{path} is truncated or has trailing bytes: {num_bytes} of data, {position} described")


def _metadata(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    own = header.get("__metadata__")
    text = own.get(_METADATA_KEY) if isinstance(own, dict) else None
    if text is None:
        return {}
    try:
        metadata = strict_json.parse(text.encode())
    except (AttributeError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: its hgprompt metadata is no valid JSON ({error!s:.200})") from error
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: its hgprompt metadata is no JSON object")
    return metadata
