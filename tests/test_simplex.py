"""Simplex solvers against closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import minimize

from hgprompt import simplex

finite = st.floats(-10, 10, allow_nan=False)


@given(arrays(np.float64, st.integers(1, 12), elements=finite))
def test_projection_is_the_nearest_point(point):
    nearest = simplex.project(point)
    assert nearest.min() >= 0
    assert abs(nearest.sum() - 1) < 1e-12
    # Optimality of a projection onto a convex set: ⟨point - nearest, v - nearest⟩ ≤ 0 for every vertex v.
    assert ((point - nearest) @ (np.eye(len(point)) - nearest).T).max() < 1e-9


def _quadratic(seed: int, size: int):
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((size, size))
    matrix, linear = root @ root.T / size, rng.standard_normal(size)
    return lambda x: (0.5 * float(x @ matrix @ x) + float(linear @ x), matrix @ x + linear)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 15))
def test_convex_quadratics_reach_the_gap_and_scipys_value(seed, size):
    function = _quadratic(seed, size)
    start = np.full(size, 1 / size)
    found = simplex.quasi_newton(function, start, tolerance=1e-9)
    assert found.converged
    assert found.gap <= 1e-9
    reference = minimize(
        function, start, jac=True, method="SLSQP", bounds=[(0, 1)] * size,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    # The gap bounds the distance to the minimum of a convex function; SLSQP adds its own 1e-8.
    assert found.value <= reference.fun + 1e-8
    slower = simplex.exponentiated_gradient(function, start, tolerance=1e-4, max_steps=20000)
    assert slower.value <= found.value + 1e-3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(-6, 0))
def test_quadratics_are_minimised_exactly(seed, size, log_condition):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    matrix = (basis * np.geomspace(1, 10**log_condition, size)) @ basis.T
    linear, start = rng.standard_normal(size), rng.dirichlet(np.ones(size))
    point = simplex.minimize_quadratic(matrix, linear, start)
    assert point.min() >= 0
    assert point.sum() == pytest.approx(1, abs=1e-12)
    # The gap bounds the distance of a convex function to its minimum.
    assert simplex.frank_wolfe_gap(point, matrix @ point + linear) <= 1e-8


def test_solution_at_a_vertex_is_exact():
    found = simplex.quasi_newton(lambda x: (float(x @ [3.0, 1.0, 2.0]), np.array([3.0, 1.0, 2.0])), np.full(3, 1 / 3))
    np.testing.assert_allclose(found.weights, [0, 1, 0], atol=1e-12)
    assert found.converged


def test_single_weight():
    assert simplex.quasi_newton(lambda x: (1.0, np.array([5.0])), np.ones(1)).weights.tolist() == [1.0]


def test_projected_gradient_is_algorithm_1():
    function = _quadratic(1, 4)
    weights = np.full(4, 0.25)
    for _ in range(7):
        weights = simplex.project(weights - 0.05 * function(weights)[1])
    found = simplex.projected_gradient(function, np.full(4, 0.25), learning_rate=0.05, steps=7)
    np.testing.assert_array_equal(found.weights, weights)
    assert (found.steps, found.evaluations) == (7, 8)


def test_starts_are_on_the_simplex_and_reproducible():
    function = _quadratic(0, 5)
    first, again = (simplex.starting_points(function, 5, 6, seed=3) for _ in range(2))
    assert len(first) == 6
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(np.sum(first, axis=1), 1)
    np.testing.assert_array_equal(first[0], np.full(5, 0.2))


def test_more_steps_never_hurt_a_non_convex_function():
    rng = np.random.default_rng(0)
    centre = rng.dirichlet(np.ones(6))

    def function(x):
        return -float(np.exp(-40 * np.sum((x - centre) ** 2))), 80 * np.exp(-40 * np.sum((x - centre) ** 2)) * (
            x - centre
        )

    values = [
        simplex.quasi_newton(function, np.full(6, 1 / 6), tolerance=0, max_steps=k).value for k in (0, 1, 3, 10, 50)
    ]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(-1, abs=1e-6)  # the bump's top is the only stationary point in reach


@pytest.mark.parametrize("count", range(1, 10))
def test_as_many_starts_as_are_asked_for(count):
    starts = simplex.starting_points(lambda w: (float(w @ w), 2 * w), 8, count, seed=0)
    assert len(starts) == count
    np.testing.assert_allclose([start.sum() for start in starts], 1)
