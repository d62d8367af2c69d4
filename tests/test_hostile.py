"""Hostile files: all that were ever found, and a few new ones in every run (benchmarks/fuzz.py reads many more)."""

from __future__ import annotations

import contextlib
import random
import resource
import warnings
from pathlib import Path

import hostile
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hgprompt.errors import HGPromptError

CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").rglob("*") if path.is_file())
LONGEST = 4_000  # characters of a message: what a file says is not repeated at any length


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


def _read(target, place, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(place, content)
        except HGPromptError as error:  # success is as good
            assert len(str(error)) <= LONGEST  # noqa: PT017
            assert not isinstance(error.__cause__, MemoryError), error  # noqa: PT017


@contextlib.contextmanager
def _at_most(more_bytes):
    """What this process may allocate, above what it has."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_found_cases(place, path):
    target, content = hostile.TARGETS[path.name.partition("-")[0]], path.read_bytes()
    with _at_most(target.limit(len(content))):
        _read(target, place, content)


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_good_files_are_read(place, name):
    """Else the fuzzers would test how files are refused, and nothing behind it."""
    for content in hostile.TARGETS[name].seeds():
        hostile.TARGETS[name].read(place, content)


@pytest.mark.parametrize("name", hostile.TARGETS)
def test_makers_make_the_same_file_again(name):
    """A case is named by its seed in the results: it must come back."""
    target = hostile.TARGETS[name]
    first = [target.make(random.Random(f"0/{name}/{i}")) for i in range(50)]
    assert first == [target.make(random.Random(f"0/{name}/{i}")) for i in range(50)]
    assert len(set(first)) > 25


@settings(deadline=None, max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("name", hostile.TARGETS)
@given(seed=st.integers(0, 2**64), changes=st.integers(0, 3))
def test_new_files(place, name, seed, changes):
    target, rng = hostile.TARGETS[name], random.Random(seed)
    content = target.make(rng)
    for _ in range(changes):
        content = target.change(content, rng)
    _read(target, place, content)
