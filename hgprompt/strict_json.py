"""JSON from strangers, and for them: what comes in has a size in memory that is known before it is parsed, and means
one thing only; what goes out is what JSON can hold."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

MAX_DEPTH = 64
MAX_VALUES = 4_000_000
"""Values in one text. Each takes at most about 150 bytes once parsed (an object of one entry): 600 MB in all."""

_DEPTH = np.zeros(256, np.int8)  # what a byte adds to the depth
_DEPTH[[ord("["), ord("{")]] = 1
_DEPTH[[ord("]"), ord("}")]] = -1
_OPENS = np.zeros(256, np.bool_)  # the bytes that a value begins with or follows, but for the first
_OPENS[[ord("["), ord("{"), ord(",")]] = True


def parse(text: bytes, *, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> Any:
    """The value that a JSON text in UTF-8 stands for.

    Takes 6 bytes for each byte of the text while it counts, and about 150 for each value.

    Raises:
        ValueError: no JSON; deeper or of more values than allowed; a key that stands twice in an object; NaN, infinity
            or a number that float64 does not hold; half of a surrogate pair, which no UTF-8 file could hold.
    """
    _check_structure(text, max_depth, max_values)
    value = json.loads(
        text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant, parse_float=_finite
    )
    if b"\\ud" in text or b"\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number that a float holds (NaN is one); True and False are none."""
    return type(value) in (int, float) and (value != value or abs(value) < 2.0**1000)


def jsonable(value: Any) -> Any:
    """Tuples as lists, NaN as null: JSON has neither."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value


def _check_structure(text: bytes, max_depth: int, max_values: int) -> None:
    """The parser recurses for every level and makes an object for every value, so both are counted first."""
    plain = np.frombuffer(text.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)  # quotes left are a text's ends
    outside = ~np.bitwise_xor.accumulate(plain == ord('"'))
    count = 1 + int(np.count_nonzero(_OPENS[plain] & outside))
    if count > max_values:
        raise ValueError(f"about {count} values, over the limit of {max_values}")
    steps = _DEPTH[plain[outside]]
    steps = steps[steps != 0]
    if len(steps) > 2 * max_values:
        raise ValueError(f"{len(steps)} brackets for at most {max_values} values")
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    if depth > max_depth:
        raise ValueError(f"nested {depth} deep, over the limit of {max_depth}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is beyond float64")
    return value
