"""JSON from strangers: what is no JSON, means two things, or would take more memory than it may."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hgprompt import strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8") | st.sampled_from('"\\[]{},:')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=30,
)  # fmt: skip


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(_depth, inner), default=0) + isinstance(value, (dict, list))


def _count(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count, inner))


@settings(deadline=None, max_examples=300)
@given(VALUES, st.booleans())
def test_reads_what_json_writes_and_counts_right(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert strict_json.parse(text) == value
    depth = _depth(value)
    assert strict_json.parse(text, max_depth=depth) == value
    if depth:
        with pytest.raises(ValueError, match="nested"):
            strict_json.parse(text, max_depth=depth - 1)
    # An empty list or object is counted as if it held one value: the count is an upper bound.
    assert strict_json.parse(text, max_values=2 * _count(value)) == value
    if _count(value) > 1:
        with pytest.raises(ValueError, match="values"):
            strict_json.parse(text, max_values=_count(value) - 1)


REFUSED = {
    "empty": b"", "half": b'{"a": 1', "two": b"1 2", "no utf-8": b'"\xff"', "key twice": b'{"a": 1, "a": 2}',
    "key twice below": b'[{"a": {"b": 1, "b": 1}}]', "NaN": b"[NaN]", "infinity": b"[-Infinity]", "1e999": b"[1e999]",
    "digits": b"1" * 10_000, "surrogate": rb'["\ud800"]', "surrogate in capitals": rb'{"\uDFFF": 1}',
    "open text": b'["aaa', "escape at the end": b'["aaa\\', "closes first": b"]]]][[[[",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_refused(text):
    with pytest.raises(ValueError, match=r"."):
        strict_json.parse(text)


def test_a_surrogate_pair_is_a_character():
    assert strict_json.parse(rb'["\ud83d\ude00"]') == ["😀"]


def test_nesting_is_refused_whatever_the_recursion_limit():
    """A program that raised the limit would have the C parser run out of stack: a crash, not an exception."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    try:
        with pytest.raises(ValueError, match="nested"):
            strict_json.parse(b"[" * 1_000_000)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'{"":0},', b"1.5,", b"[[", b'"ab",', b"]"])
def test_memory_does_not_grow_with_what_a_text_could_hold(piece):
    """16 MB of the costliest pieces: refused before an object is made."""
    with pytest.raises(ValueError, match=r"values|nested"):
        strict_json.parse(b"[" + piece * (16 * 2**20 // len(piece)), max_values=1_000_000)
