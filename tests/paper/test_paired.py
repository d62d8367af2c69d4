"""Paired differences: against scipy's permutation test and hand-counted cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import permutation_test

from hgprompt.paper import paired
from hgprompt.paper.paired import difference, least_p, sign_flip_p


def _of_scipy(differences):
    """permutation_test of paired samples flips signs where the other sample is zero."""
    zero = np.zeros(len(differences))
    return permutation_test(
        (np.asarray(differences), zero), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue


@pytest.mark.parametrize("count", [2, 3, 7, 11, 13])
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_p_is_scipys(count, shift):
    differences = np.random.default_rng(count).normal(shift, 1, count)
    # scipy doubles the smaller tail, and never gives more than 1; ties aside both count the same 2^n cases.
    assert sign_flip_p(differences) == pytest.approx(_of_scipy(differences), abs=1e-12)


def test_vtabs_tasks_are_counted_and_more_are_sampled(monkeypatch):
    assert sign_flip_p(np.ones(19)) == least_p(19) == 2 / 2**19
    assert sign_flip_p(np.ones(40)) == least_p(40) > 0  # no sample can say that p is 0
    differences = np.random.default_rng(0).normal(0.3, 1, 13)
    monkeypatch.setattr(paired, "_MOST_EXACT", 12)
    # Of 100,000 draws: a deviation of sqrt(p (1 - p) / 1e5) < 0.0016; five of them.
    assert sign_flip_p(differences) == pytest.approx(_of_scipy(differences), abs=0.008)


def test_by_hand():
    ours = {"ants": [0.5, 0.7], "bees": [0.9, 0.9]}
    theirs = {"ants": [0.4, 0.7], "bees": [0.6, 0.8], "cats": [0.0, 0.0]}
    found = difference(ours, theirs, ["ants", "bees"])
    # Of the tasks: 5 and 20 points; flips give ±12.5 and ±7.5, half of which are as far from 0 as 12.5.
    assert found.mean == pytest.approx(12.5)
    assert found.error == pytest.approx(7.5)  # 15/√2 is their deviation, over √2
    assert found.p == 0.5
    assert (found.ahead, found.ties, found.runs) == (3, 1, 4)


def test_no_difference_and_one_task():
    same = {"ants": [0.5], "bees": [0.9]}
    found = difference(same, same, ["ants", "bees"])
    assert (found.mean, found.error, found.p, found.ties) == (0.0, 0.0, 1.0, 2)
    assert difference(same, same, ["ants"]).error is None
    assert sign_flip_p([3.0]) == 1.0  # either sign is as far
