"""Minimisers on the probability simplex {α ≥ 0, Σα = 1}.

A function to minimise takes α [M] (numpy float64) and returns its value and its gradient [M]. Stationarity is
measured by the Frank–Wolfe gap ⟨∇f(α), α⟩ − min_i ∇f(α)_i ≥ 0, which is 0 exactly at first-order stationary points
and bounds f(α) − min f from above where f is convex (Jaggi 2013, "Revisiting Frank–Wolfe").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Function = Callable[[Vector], tuple[float, Vector]]


@dataclass(frozen=True)
class Minimum:
    """Where a minimiser stopped.

    Attributes:
        weights: α [M] on the simplex. value: f(α). gap: Frank–Wolfe gap there.
        steps: iterations. evaluations: calls of the function. converged: the gap reached the tolerance.
    """

    weights: Vector
    value: float
    gap: float
    steps: int
    evaluations: int
    converged: bool


def project(point: Vector) -> Vector:
    """Euclidean projection onto the simplex, by sorting (Held, Wolfe & Crowder 1974)."""
    ordered = np.sort(point)[::-1]
    surplus = np.cumsum(ordered) - 1
    support = np.nonzero(ordered * np.arange(1, len(point) + 1) > surplus)[0][-1]
    return np.maximum(point - surplus[support] / (support + 1), 0)


def frank_wolfe_gap(weights: Vector, gradient: Vector) -> float:
    """⟨∇, α⟩ − min_i ∇_i, at least 0."""
    return max(float(gradient @ weights - gradient.min()), 0.0)


def quasi_newton(function: Function, start: Vector, *, tolerance: float = 1e-6, max_steps: int = 200) -> Minimum:
    """Sequential quadratic programming with a damped BFGS model, feasible at every step.

    Each step minimises the model over the simplex itself, so that weights reach 0 exactly, and searches the line to
    that point (Armijo); convergence near the solution is superlinear. See Nocedal & Wright, chapter 18.
    """
    weights = project(np.asarray(start, dtype=np.float64))
    value, gradient = function(weights)
    evaluations, size = 1, len(weights)
    model = np.eye(size) * max(float(np.linalg.norm(gradient - gradient.mean())), 1e-8)
    for step in range(max_steps + 1):
        gap = frank_wolfe_gap(weights, gradient)
        if gap <= tolerance or step == max_steps:
            return Minimum(weights, value, gap, step, evaluations, gap <= tolerance)
        target = minimize_quadratic(model, gradient - model @ weights, weights)
        direction = target - weights
        slope = float(gradient @ direction)
        length = 1.0
        while True:
            candidate = weights + length * direction
            new_value, new_gradient = function(candidate)
            evaluations += 1
            # The second term forgives rounding once f has as many digits as it will get.
            if new_value <= value + 1e-4 * length * slope + 1e-15 * abs(value):
                break
            # Minimum of the parabola through both values and the slope, kept inside [0.1, 0.5] of the step.
            curve = 2 * (new_value - value - length * slope)
            length *= float(np.clip(-slope * length / curve if curve > 0 else 0.5, 0.1, 0.5))
            if length < 1e-12:
                return Minimum(weights, value, gap, step, evaluations, False)
        _update_model(model, candidate - weights, new_gradient - gradient)
        weights, value, gradient = candidate, new_value, new_gradient
    raise AssertionError("unreachable")


def projected_gradient(
    function: Function, start: Vector, *, learning_rate: float, steps: int, tolerance: float = 0.0
) -> Minimum:
    """Algorithm 1 to the letter: α ← Π(α − η ∇f(α)) with a fixed η, for a fixed number of steps.

    Line 8 of the algorithm leaves the simplex; Π is the Euclidean projection back. Stops early at `tolerance`.
    """
    weights = project(np.asarray(start, dtype=np.float64))
    value, gradient = function(weights)
    for step in range(steps + 1):
        gap = frank_wolfe_gap(weights, gradient)
        if step == steps or gap <= tolerance:
            return Minimum(weights, value, gap, step, step + 1, gap <= tolerance)
        weights = project(weights - learning_rate * gradient)
        value, gradient = function(weights)
    raise AssertionError("unreachable")


def exponentiated_gradient(
    function: Function, start: Vector, *, tolerance: float = 1e-6, max_steps: int = 2000
) -> Minimum:
    """Mirror descent in the entropy (Kivinen & Warmuth 1997) with backtracking; never leaves the interior."""
    weights = project(np.asarray(start, dtype=np.float64))
    weights = np.maximum(weights, 1e-12) / np.maximum(weights, 1e-12).sum()
    value, gradient = function(weights)
    rate, evaluations = 1.0 / max(float(np.abs(gradient - gradient.mean()).max()), 1e-12), 1
    for step in range(max_steps + 1):
        gap = frank_wolfe_gap(weights, gradient)
        if gap <= tolerance or step == max_steps:
            return Minimum(weights, value, gap, step, evaluations, gap <= tolerance)
        while True:
            candidate = weights * np.exp(-rate * (gradient - gradient.min()))
            candidate /= candidate.sum()
            new_value, new_gradient = function(candidate)
            evaluations += 1
            if new_value <= value + 0.5 * float(gradient @ (candidate - weights)) + 1e-15 * abs(value):
                break
            rate /= 3
            if rate < 1e-12:
                return Minimum(weights, value, gap, step, evaluations, False)
        weights, value, gradient = candidate, new_value, new_gradient
        rate *= 2
    raise AssertionError("unreachable")


def starting_points(function: Function, size: int, count: int, seed: int) -> list[Vector]:
    """At most `count` starts: uniform, then the best by value of near-vertices and of Dirichlet draws, half each.

    Near-vertices lean 90 % to one entry, so that the gradient there still knows the others.
    """
    uniform = np.full(size, 1 / size)
    if size == 1 or count <= 1:
        return [uniform]
    vertices = list(0.9 * np.eye(size) + 0.1 / size)
    draws = list(np.random.default_rng(seed).dirichlet(np.ones(size), size=2 * count))
    starts = [uniform]
    for group, share in ((vertices, (count + 1) // 2 - 1), (draws, count // 2)):
        ranked = sorted(group, key=lambda point: function(point)[0])
        starts += ranked[:share]
    return starts


def minimize_quadratic(matrix: NDArray[np.float64], linear: Vector, start: Vector) -> Vector:
    """argmin over the simplex of ½ tᵀBt + cᵀt with a positive definite B, exactly: a primal active-set method
    (Nocedal & Wright, chapter 16), after a few steps of projected gradient that find most of the support.

    Args:
        matrix: B [M, M]. linear: c [M]. start: a point of the simplex.
    """
    point = start
    rate = 1 / max(float(np.linalg.norm(matrix, np.inf)), 1e-300)  # at least the largest eigenvalue
    for _ in range(10):
        point = project(point - rate * (linear + matrix @ point))
    free = point > 0
    for _ in range(20 * len(point) + 20):
        target = np.zeros_like(point)
        target[free], multiplier = _on_face(matrix[np.ix_(free, free)], linear[free])
        blocked = target < 0
        if blocked.any():  # go as far as the simplex reaches; what hits its border leaves the support
            lengths = np.where(blocked, point / np.where(blocked, point - target, 1), np.inf)
            point = np.maximum(point + lengths.min() * (target - point), 0)
            point[lengths <= lengths.min()] = 0
            free = point > 0
            continue
        point = target
        slopes = linear + matrix @ point - multiplier
        entering = int(np.argmin(np.where(free, np.inf, slopes)))
        if free.all() or slopes[entering] >= -1e-12 * (np.abs(linear).max() + abs(multiplier)):
            break
        free[entering] = True
    return np.asarray(point / point.sum())


def _on_face(matrix: NDArray[np.float64], linear: Vector) -> tuple[Vector, float]:
    """argmin of ½ tᵀBt + cᵀt with Σt = 1 and the multiplier of that constraint: Bt + c = multiplier."""
    solved = np.linalg.solve(matrix, np.stack([np.ones_like(linear), linear], axis=1))
    ones, rest = solved[:, 0], solved[:, 1]
    multiplier = (1 + rest.sum()) / ones.sum()
    return multiplier * ones - rest, float(multiplier)


def _update_model(model: NDArray[np.float64], step: Vector, change: Vector) -> None:
    """BFGS update in place, damped as by Powell so that the model stays positive definite where f is not convex; and
    regular in float64, where weights differ in effect by many orders of magnitude."""
    curvature = model @ step
    expected = float(step @ curvature)
    if expected <= 0:
        return
    actual = float(step @ change)
    damping = 1.0 if actual >= 0.2 * expected else 0.8 * expected / (expected - actual)
    change = damping * change + (1 - damping) * curvature
    model -= np.outer(curvature, curvature) / expected
    model += np.outer(change, change) / float(step @ change)
    model.flat[:: len(model) + 1] += 1e-14 * np.trace(model)
