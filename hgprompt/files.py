"""Reading and writing files: the one place that does. What is read is data from strangers, never code.

Written files appear whole or not at all (temporary name, then rename). Read files are checked before anything is
allocated for them; tensors are then parsed by the safetensors library.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from hgprompt.errors import FileFormatError, OutputError

MAX_FILE_BYTES = 8 * 2**30
MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSORS = 200_000
_METADATA_KEY = "hgprompt"
_DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_CHECKSUM = "sha256"
_BLOCK = 2**20
_SUFFIX = ".tmp"


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
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file.

    Args:
        path: the file; of any origin.
        max_bytes, max_header_bytes: what the file may hold at most.
        checksum: it must end with that of `write_safetensors`, which finds damage, not forgery.

    Returns:
        The tensors by name, and what `write_safetensors` took as metadata ({} for files of other programs).

    Raises:
        FileFormatError: missing, no regular file, too large, truncated, a pickle, or inconsistent in any way.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = _read_header(path, file, max_bytes, max_header_bytes)
            if checksum:
                _check_checksum(path, file, header)
    except IsADirectoryError as error:
        raise FileFormatError(f"{path} is a directory, not a safetensors file") from error
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist") from error
    except OSError as error:
        raise FileFormatError(f"cannot read {path}: {error.strerror or error}") from error
    metadata = _metadata(path, header)
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise FileFormatError(f"{path} is no readable safetensors file: {error}") from error
    if checksum:
        del tensors[_CHECKSUM]
    return tensors, metadata


def remove_temporaries(path: Path) -> None:
    """Delete what killed writers of this file have left beside it."""
    for left in path.parent.glob(f"{glob.escape(_temporary(path))}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            left.unlink()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place once the block has ended well."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=_temporary(path), suffix=_SUFFIX, dir=path.parent)
    except OSError as error:
        hint = "" if path.parent.is_dir() else f" ({path.parent} is no directory)"
        raise OutputError(f"cannot write {path}: {error.strerror or error}{hint}; choose another place") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except BaseException as error:  # also KeyboardInterrupt: nothing half-written stays
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
        raise


def _temporary(path: Path) -> str:
    return f".{path.name[:100]}."


def _check_checksum(path: Path, file: BinaryIO, header: dict[str, Any]) -> None:
    entry = header.get(_CHECKSUM, {})
    left = os.fstat(file.fileno()).st_size - 32
    data = left + 32 - file.tell()  # the header has just been read
    if entry != {"dtype": "U8", "shape": [32], "data_offsets": [data - 32, data]}:
        raise FileFormatError(f"{path} does not end with a checksum")
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    if file.read(32) != digest.digest():
        raise FileFormatError(f"{path} is damaged: its checksum is not that of its content")


def _read_header(path: Path, file: BinaryIO, max_bytes: int, max_header_bytes: int) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    if not path.is_file():
        raise FileFormatError(f"{path} is not a regular file")
    if size > max_bytes:
        raise FileFormatError(f"{path} is {size} bytes, over the limit of {max_bytes}")
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
            f"{path} is no safetensors file, or truncated: it claims a header of {length} bytes "
            f"(file: {size}, limit: {max_header_bytes})"
        )
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is no safetensors file: its header is no valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise FileFormatError(f"{path} is no safetensors file: its header is no JSON object")
    _check_layout(path, header, size - 8 - length)
    return header


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
            valid = all(type(s) is int and 0 <= s < 2**63 for s in sizes)
            valid = valid and end - begin == math.prod(shape) * _DTYPE_BYTES[dtype]
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
    text = (
        (header.get("__metadata__") or {}).get(_METADATA_KEY) if isinstance(header.get("__metadata__"), dict) else None
    )
    if text is None:
        return {}
    try:
        metadata = json.loads(text, parse_constant=_no_constant)
    except (ValueError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path}: its hgprompt metadata is no valid JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path}: its hgprompt metadata is no JSON object")
    return metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
