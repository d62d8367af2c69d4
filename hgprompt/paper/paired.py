"""Is one method better than another? Differences on the same tasks with the same seeds, and a test that assumes little.

A task is one observation, the mean of its seeds: seeds of one task share its images, and are no independent evidence.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_MOST_EXACT = 20  # differences: a million sums, which has room for VTAB's 19 tasks
_DRAWS = 100_000
_EQUAL = 1e-12  # means of the same numbers in another order


@dataclass(frozen=True)
class Difference:
    """Of one method and another, in percentage points.

    Attributes:
        mean: over tasks. error: standard error of the mean over tasks; None with one task.
        p: two-sided, of the sign-flip test over tasks: how often a difference this large comes about where the methods
            are alike, so that each task's difference could as well have had the other sign. At least 2 / 2^tasks.
        ahead, ties, runs: pairs of runs with one seed on one task in which the first was better; was equal; all.
    """

    mean: float
    error: float | None
    p: float
    ahead: int
    ties: int
    runs: int


def difference(
    one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]], tasks: Sequence[str]
) -> Difference:
    """Of {task: accuracies in 0 … 1, one per seed} of two methods."""
    runs = [[100 * (a - b) for a, b in zip(one[task], other[task], strict=True)] for task in tasks]
    means = [statistics.fmean(run) for run in runs]
    every = list(itertools.chain.from_iterable(runs))
    return Difference(
        mean=statistics.fmean(means),
        error=statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        p=sign_flip_p(means),
        ahead=sum(d > 0 for d in every),
        ties=sum(d == 0 for d in every),
        runs=len(every),
    )


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of differences under flips of their signs: all of them, or of many a sample (seeded)."""
    values = np.asarray(differences, dtype=np.float64)
    count = len(values)
    exact = count <= _MOST_EXACT
    if exact:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate([sums - value, sums + value])
    else:
        sums = np.random.default_rng(0).choice([-1, 1], size=(_DRAWS, count)) @ values
    as_far = np.abs(sums) >= abs(values.sum()) * (1 - _EQUAL) - _EQUAL
    return float(as_far.mean()) if exact else float((1 + as_far.sum()) / (1 + _DRAWS))


def least_p(count: int) -> float:
    """The smallest p that so many differences can give."""
    return 2 / 2**count if count <= _MOST_EXACT else 1 / (1 + _DRAWS)
