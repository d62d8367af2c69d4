"""The reduced basis: a lower bound of H that touches it where it was shown, and the same solutions through it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import data, statistics_of

from hgprompt.objective import HScore
from hgprompt.reduced_basis import ReducedHScore


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(8, 90), st.integers(2, 5), st.sampled_from(["features", "moments"]))
def test_below_the_whole_and_exact_where_shown(seed, n, m, keep):
    statistics = statistics_of(*data(n, m, 40, 3, seed=seed), keep)
    score = HScore(statistics, shrinkage=0.05)
    reduced = ReducedHScore(score, capacity=20)
    points = np.random.default_rng(seed).dirichlet(np.ones(m), size=4)
    reduced.take([score.evaluate(points[0])[1]], besides=[score.evaluate(vertex)[1] for vertex in np.eye(m)])
    reduced.show(points[1])
    for point in points[:2]:
        value, gradient = score(point)
        ours, slope = reduced(point)
        assert ours == pytest.approx(value, rel=1e-8)  # directions below 1e-9 of the largest are left out
        np.testing.assert_allclose(slope, gradient, atol=1e-6 * max(1.0, np.abs(gradient).max()))
    for point in points[2:]:
        assert reduced(point)[0] <= score(point)[0] * (1 + 1e-9)


def test_a_full_basis_starts_again_from_the_latest():
    statistics = statistics_of(*data(80, 4, 40, 5))
    score = HScore(statistics, shrinkage=0.05)
    reduced = ReducedHScore(score, capacity=10)
    for point in np.random.default_rng(0).dirichlet(np.ones(4), size=6):
        reduced.show(point)
        assert reduced.basis.shape[1] <= 10
        assert reduced(point)[0] == pytest.approx(score(point)[0], rel=1e-8)


def test_what_is_known_already_takes_no_room():
    """Eight prompts that are one: two directions tell three classes apart, whoever brings them."""
    features, labels = data(120, 1, 40, 3)
    score = HScore(statistics_of(features.expand(8, -1, -1).contiguous(), labels), shrinkage=0.05)
    reduced = ReducedHScore(score, capacity=20)
    reduced.take([score.evaluate(np.full(8, 1 / 8))[1]], besides=[score.evaluate(v)[1] for v in np.eye(8)])
    assert reduced.basis.shape[1] == 2


def test_directions_are_orthonormal():
    reduced = ReducedHScore(HScore(statistics_of(*data(80, 4, 40, 5)), shrinkage=0.05), capacity=40)
    for point in np.random.default_rng(0).dirichlet(np.ones(4), size=6):
        reduced.show(point, point)
    gram = reduced.basis.T @ reduced.basis
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "worth"),
    [
        ((50, 3, 40, 3), False),
        ((50, 3, 200, 3), True),
        ((100, 3, 200, 80), False),
        ((400, 13, 130, 3), True),
        ((50, 200, 130, 3), False),
    ],
    ids=str,
)
def test_where_a_basis_pays(shape, worth):
    capacity = ReducedHScore.capacity_for(HScore(statistics_of(*data(*shape)), shrinkage=0.1))
    assert bool(capacity) == worth
    assert capacity <= shape[2] // 2
    assert ReducedHScore.capacity_for(HScore(statistics_of(*data(*shape)), shrinkage=0.0)) == 0
