"""From statistics and gradients to α: the objective minimised on the simplex, and how sure α is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hgprompt import simplex
from hgprompt.errors import OptionError
from hgprompt.objective import Alignment, HScore, Objective, Shrinkage, check_shrinkage
from hgprompt.simplex import Minimum, Vector
from hgprompt.statistics import EnsembleStatistics

logger = logging.getLogger(__name__)

Solver = Literal["quasi-newton", "exponentiated-gradient", "projected-gradient"]
MAX_LAM = 1e9
"""Beyond, the H-score is lost in the rounding of the alignment loss: that is uniform weights, at no cost."""


@dataclass(frozen=True)
class Diagnostics:
    """How good a solution is, and what the problem looked like.

    Attributes:
        objective: value at the weights; h_score, alignment_loss: its two parts there (H raw, not divided by C-1).
        gap: Frank–Wolfe gap of the objective at the weights. converged: the gap reached the tolerance.
        intensity: shrinkage intensity of the covariance.
        source_h_scores: H of each prompt alone [M]. uniform_h_score: H at uniform weights.
        start_objectives: value reached from each start, ascending. evaluations: of the objective, over all starts.
    """

    objective: float
    h_score: float
    alignment_loss: float
    gap: float
    converged: bool
    intensity: float
    source_h_scores: Tensor
    uniform_h_score: float
    start_objectives: tuple[float, ...]
    evaluations: int


class Solution(NamedTuple):
    """weights: α [M], float64, on the simplex; and the diagnostics."""

    weights: Tensor
    diagnostics: Diagnostics


def optimize_weights(
    statistics: EnsembleStatistics,
    gram: Tensor | None = None,
    *,
    lam: float = 1.0,
    shrinkage: Shrinkage = "auto",
    normalize: bool = True,
    solver: Solver = "quasi-newton",
    starts: int = 8,
    tolerance: float = 1e-6,
    max_steps: int = 200,
    learning_rate: float = 0.005,
    seed: int = 0,
) -> Solution:
    """Minimise -H(α)/(C-1) + λ L_align(α) over the simplex (Eq. 12). Deterministic.

    Args:
        statistics: of one pass, see `EnsembleStatistics`.
        gram: K [M, M] of the normalised gradients (`gram_of`); None: the H-score alone.
        lam: λ ≥ 0.
        shrinkage: as for `h_score`.
        normalize: divide H by C-1, its largest value; False: Eq. 12 to the letter.
        solver: "quasi-newton" and "exponentiated-gradient" stop at the tolerance; "projected-gradient" takes
            `max_steps` steps of `learning_rate`, as Algorithm 1 does.
        starts: the objective is not convex: uniform, near-vertices and random points, the best of them by value.
        tolerance: Frank–Wolfe gap at which to stop.
        max_steps: per start.
        learning_rate: η of "projected-gradient".
        seed: of the random starts.

    Raises:
        DataError, PromptError: statistics that no H-score can be computed from. OptionError: bad arguments.
    """
    check_options(lam=lam, shrinkage=shrinkage, solver=solver, starts=starts)
    size = statistics.num_prompts
    if gram is not None and tuple(gram.shape) != (size, size):
        raise OptionError(f"gram must be [{size}, {size}] for {size} prompts, got {list(gram.shape)}")
    objective = Objective(
        HScore(statistics, shrinkage=shrinkage),
        None if gram is None else Alignment(_array(gram)),
        lam,
        normalize,
    )
    points = simplex.starting_points(objective, size, starts, seed)
    minima = sorted(
        (_minimize(objective, point, solver, tolerance, max_steps, learning_rate) for point in points),
        key=lambda m: m.value,
    )
    best = minima[0]
    if not best.converged and solver != "projected-gradient":
        logger.warning("α stopped at a gap of %.2g, above the tolerance of %.2g", best.gap, tolerance)
    h = objective.h_score
    diagnostics = Diagnostics(
        objective=best.value,
        h_score=h(best.weights)[0],
        alignment_loss=float("nan") if objective.alignment is None else objective.alignment(best.weights)[0],
        gap=best.gap,
        converged=best.converged,
        intensity=h.intensity,
        source_h_scores=torch.tensor([h(vertex)[0] for vertex in np.eye(size)], dtype=torch.float64),
        uniform_h_score=h(np.full(size, 1 / size))[0],
        start_objectives=tuple(m.value for m in minima),
        evaluations=sum(m.evaluations for m in minima),
    )
    return Solution(torch.from_numpy(best.weights.copy()), diagnostics)


def jackknife_std(
    statistics: EnsembleStatistics,
    solution: Solution,
    fold_grams: Sequence[Tensor] | None,
    *,
    lam: float,
    normalize: bool = True,
    solver: Solver = "quasi-newton",
    tolerance: float = 1e-6,
    max_steps: int = 200,
    learning_rate: float = 0.005,
) -> Tensor:
    """Standard error of α [M] by the delete-one-group jackknife over the folds of the statistics.

    Each fold is left out in turn and the problem solved again from the solution (by projected gradient: from uniform,
    as Algorithm 1 starts), with the same intensity. What is measured is the sampling of the images around this local
    minimum; another minimum elsewhere stays unseen.

    Args:
        statistics: with at least two folds, else the result is NaN.
        solution: of the whole data.
        fold_grams: the Gram matrix without fold k, for every k; None: the H-score alone.
        lam, normalize, solver, tolerance, max_steps, learning_rate: as for `optimize_weights`.
    """
    folds, start = statistics.folds, solution.weights.numpy()
    if folds < 2 or statistics.num_images < 2 * folds:
        return torch.full((len(start),), float("nan"), dtype=torch.float64)
    if solver == "projected-gradient":
        start = np.full(len(start), 1 / len(start))
    weights = []
    for k in range(folds):
        objective = Objective(
            HScore(statistics, shrinkage=solution.diagnostics.intensity, without_fold=k),
            None if fold_grams is None else Alignment(_array(fold_grams[k])),
            lam,
            normalize,
        )
        weights.append(_minimize(objective, start, solver, tolerance, max_steps, learning_rate).weights)
    spread = np.var(np.stack(weights), axis=0)
    return torch.from_numpy(np.sqrt((folds - 1) * spread))


def check_options(*, lam: float, shrinkage: Shrinkage, solver: Solver, starts: int) -> None:
    """Raise OptionError for what can be known to be wrong before any work is done."""
    if not 0 <= lam <= MAX_LAM:
        raise OptionError(f"lam must be a number from 0 to {MAX_LAM:g}, got {lam}")
    check_shrinkage(shrinkage)
    if solver not in ("quasi-newton", "exponentiated-gradient", "projected-gradient"):
        raise OptionError(
            f"solver must be 'quasi-newton', 'exponentiated-gradient' or 'projected-gradient', got {solver!r}"
        )
    if starts < 1:
        raise OptionError(f"starts must be at least 1, got {starts}")


def _minimize(
    objective: Objective,
    start: Vector,
    solver: Solver,
    tolerance: float,
    max_steps: int,
    learning_rate: float,
) -> Minimum:
    if solver == "projected-gradient":
        return simplex.projected_gradient(objective, start, learning_rate=learning_rate, steps=max_steps)
    if solver == "exponentiated-gradient":
        return simplex.exponentiated_gradient(objective, start, tolerance=tolerance, max_steps=10 * max_steps)
    return simplex.quasi_newton(objective, start, tolerance=tolerance, max_steps=max_steps)


def _array(tensor: Tensor) -> Vector:
    return tensor.detach().to("cpu", torch.float64).numpy()
