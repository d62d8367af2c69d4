"""Numbers that callers give: NumPy's become Python's, which JSON and every comparison know; others are refused."""

from __future__ import annotations

import operator
from typing import Any

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
