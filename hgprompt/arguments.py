"""What callers give: NumPy's numbers become Python's, which JSON and all comparisons know; what is none is refused."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from hgprompt.errors import OptionError


def whole(name: str, value: Any) -> int:
    """An int, of anything that is a whole number; OptionError names the argument."""
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be a whole number, got {value!r:.80}") from None


def real(name: str, value: Any) -> float:
    """A float, of anything that is a number; a text is none. OptionError names the argument."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name} must be a number, got {value!r:.80}") from None


def kind_of(value: Any) -> str:
    """Shape and dtype of a tensor, the type of anything else: for messages."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def is_floating(value: Any, ndim: int) -> bool:
    """Whether it is a floating point tensor of so many dimensions."""
    return isinstance(value, Tensor) and value.ndim == ndim and value.is_floating_point()


def check_place(device: Any, dtype: Any) -> None:
    """OptionError for a device that there is not, or a dtype that no network computes in; None is for neither."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(f"dtype must be a floating point dtype such as torch.float32, got {dtype!r}")
    if device is not None:
        try:
            torch.zeros(1, device=device).cpu()  # what is on "meta" cannot come back
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # no device's name, or not here
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            raise OptionError(
                f"device {device!r} cannot be used here: {reason}; leave it out, or give 'cpu'"
            ) from error
