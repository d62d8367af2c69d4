"""One image file, of any origin, to RGB pixels: what it may take is known before anything is decoded."""

from __future__ import annotations

import functools
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hgprompt.errors import DataError, FileFormatError
from hgprompt.files import open_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
"""The decoders that a file can reach, whatever its name: those of SUFFIXES."""
MAX_PIXELS = 64 * 2**20
"""Decoding takes up to 24 bytes a pixel (transparency laid on white): 1.5 GiB for the largest image."""
MAX_IMAGE_BYTES = 256 * 2**20
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 768 * 2**20
"""Pixels × scans of a JPEG: a scan takes a handful of bytes in the file, and a pass over all pixels to decode."""
_ROWS = 256  # of a 16-bit image, scaled at a time


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An RGB image, or DataError that names the file.

    Args:
        path: a regular file of one of FORMATS, up to MAX_IMAGE_BYTES.
        max_pixels: an image with more is refused before it is decoded.

    Transparency is laid on white, 16 bit are scaled to 8, the first frame of an animation is taken, and a photograph
    is turned as its EXIF data says.
    """
    try:
        with open_regular(path, MAX_IMAGE_BYTES) as opened:
            # In memory: a file's read() allocates all that is asked for, and decoders ask for what a header claims.
            file = io.BytesIO(opened.read(os.fstat(opened.fileno()).st_size))
        _check_webp(file, max_pixels)
        with Image.open(file, formats=_decoders()) as image:
            _check_size(*image.size, max_pixels)
            if image.format in ("JPEG", "MPO"):  # the latter is a JPEG with several pictures
                _check_scans(file, image.size)
            return _to_rgb(ImageOps.exif_transpose(image))
    except (DataError, FileFormatError) as error:
        text = str(error)
        raise DataError(text if str(path) in text else f"{path} {text}") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no readable image: its content is none of {', '.join(_decoders())}") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit comes first where ours is larger
        raise DataError(f"{path} is too large: {error}") from error
    except Exception as error:  # decoders raise many kinds for damaged files
        raise DataError(f"{path} is no readable image: {type(error).__name__}: {error!s:.200}") from error


@functools.cache
def _decoders() -> tuple[str, ...]:
    """Of FORMATS, those that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"is {width}×{height} pixels, over the limit of {max_pixels}")


def _check_webp(file: io.BytesIO, max_pixels: int) -> None:
    """Before Pillow opens it: its decoder allocates two canvases at once, of the size that the extended header says."""
    head = file.read(30)
    file.seek(0)
    if len(head) == 30 and head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        width, height = (1 + int.from_bytes(head[i : i + 3], "little") for i in (24, 27))
        _check_size(width, height, max_pixels)


def _check_scans(file: io.BytesIO, size: tuple[int, int]) -> None:
    """In a JPEG's coded data a marker cannot stand by chance, so that its scans can be counted."""
    scans = file.getvalue().count(b"\xff\xda")
    if scans > MAX_SCANS or scans * size[0] * size[1] > MAX_SCANNED_PIXELS:
        raise DataError(
            f"is a JPEG of {scans} scans of {size[0]}×{size[1]} pixels: decoding would take too long "
            f"(limits: {MAX_SCANS} scans, {MAX_SCANNED_PIXELS} pixels in all of them)"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("has floating-point pixels of unknown range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit files have values up to 65535, whatever mode Pillow opens them in; 65535 becomes 255."""
    values = np.asarray(image)
    if image.mode == "I" and values.size and (values.min() < 0 or values.max() > 65535):
        raise DataError("has 32-bit pixels beyond 0 … 65535, of unknown range: save it with 8 or 16 bits")
    grey = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        grey[rows] = (values[rows].clip(0, 65535).astype(np.uint32) + 128) // 257  # to the nearest: 257 is odd
    return Image.fromarray(grey, "L").convert("RGB")
