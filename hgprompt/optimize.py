"""From statistics and gradients to α: the objective minimised on the simplex, and how sure α is."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgprompt import simplex
from hgprompt.arguments import is_floating, kind_of, real, whole
from hgprompt.errors import DataError, OptionError, PromptError, StatisticsError
from hgprompt.objective import Alignment, HScore, Objective, Shrinkage, check_shrinkage, of_unit_gradients
from hgprompt.reduced_basis import ReducedHScore
from hgprompt.simplex import Function, Minimum, Vector
from hgprompt.statistics import EnsembleStatistics
from hgprompt.uncertainty import h_score_std, source_covariance, source_influence

logger = logging.getLogger(__name__)

Solver = Literal["quasi-newton", "exponentiated-gradient", "projected-gradient"]
MAX_LAM = 1e9
"""Beyond, the H-score is lost in the rounding of the alignment loss: that is uniform weights, at no cost."""
_ROUNDS = 50
_SAME = 0.02  # local minima nearer than this (L1) count as one
_JACKKNIFE_STARTS = 3


@dataclass(frozen=True)
class Diagnostics:
    """How good a solution is, and what the problem looked like.

    Attributes:
        objective: value at the weights; h_score, alignment_loss: its two parts there (H raw, not divided by C-1).
        gap: Frank–Wolfe gap of the objective at the weights. converged: the gap reached the tolerance.
        intensity: shrinkage intensity of the covariance.
        source_h_scores: H of each prompt alone [M]. uniform_h_score: H at uniform weights.
        start_objectives: value reached from each start, ascending. local_minima: the distinct points reached [S, M],
            best first. evaluations: of the whole H-score, in all.
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
    local_minima: Tensor
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
        gram: K [M, M] of the gradients (`gram_of`), normalised here; None: the H-score alone.
        lam: λ ≥ 0.
        shrinkage: as for `h_score`.
        normalize: divide H by C-1, its largest value; False: Eq. 12 to the letter.
        solver: "quasi-newton" and "exponentiated-gradient" stop at the tolerance; "projected-gradient" takes
            `max_steps` steps of `learning_rate`, as Algorithm 1 does.
        starts: the objective is not convex: uniform, near-vertices and random points, the best of them by value.
        tolerance: Frank–Wolfe gap at which to stop.
        max_steps: per start; the cheaper steps of "exponentiated-gradient" are ten times as many.
        learning_rate: η of "projected-gradient".
        seed: of the random starts.

    Raises:
        DataError, PromptError: statistics that no H-score can be computed from. OptionError: bad arguments.
    """
    check_lam(lam)
    return WeightProblem(
        statistics, gram, shrinkage=shrinkage, normalize=normalize, solver=solver, starts=starts, tolerance=tolerance,
        max_steps=max_steps, learning_rate=learning_rate, seed=seed,
    ).solve(lam)  # fmt: skip


class WeightProblem:
    """All about α that one pass can answer: any λ, paths over λ, ablations, pools with a prompt left out, errors.

    What the questions have in common is computed once: the H-score of each prompt, and a reduced basis
    (`hgprompt.reduced_basis`) in which all minimisations run; each answer is checked against the whole objective.

    Args:
        statistics, gram, shrinkage, normalize, solver, starts, tolerance, max_steps, learning_rate, seed: as for
            `optimize_weights`; they hold for every question.
    """

    def __init__(
        self,
        statistics: EnsembleStatistics,
        gram: Tensor | None = None,
        *,
        shrinkage: Shrinkage = "auto",
        normalize: bool = True,
        solver: Solver = "quasi-newton",
        starts: int = 8,
        tolerance: float = 1e-6,
        max_steps: int = 200,
        learning_rate: float = 0.005,
        seed: int = 0,
    ) -> None:
        check_problem(shrinkage, solver, starts, tolerance, max_steps, learning_rate, seed)
        if not isinstance(statistics, EnsembleStatistics):
            raise OptionError(f"statistics must be EnsembleStatistics, got {type(statistics).__name__}")
        size = statistics.num_prompts
        self.statistics, self.size, self.normalize = statistics, size, normalize
        self.starts, self.tolerance, self.max_steps, self.seed = starts, tolerance, max_steps, seed
        self.solver, self.learning_rate = solver, learning_rate
        self.alignment = None if gram is None else Alignment(of_unit_gradients(gram, size).numpy())
        self.score = HScore(statistics, shrinkage=shrinkage)
        self._reduced: ReducedHScore | None = None
        capacity = ReducedHScore.capacity_for(self.score)
        self.uniform_h_score, uniform_z = self.score.evaluate(np.full(size, 1 / size))
        alone = [self.score.evaluate(vertex) for vertex in np.eye(size)]
        self.source_h_scores = torch.tensor([value for value, _ in alone], dtype=torch.float64, device="cpu")
        self._influence = source_influence(self.score, [z for _, z in alone])
        if capacity:
            self._reduced = ReducedHScore(self.score, capacity)
            self._reduced.take([uniform_z], besides=[z for _, z in alone])

    @property
    def source_covariance(self) -> Tensor:
        """Covariance [M, M] of the errors of `source_h_scores`, see `hgprompt.uncertainty`."""
        return source_covariance(self.statistics, self.score.intensity, self._influence)

    def h_score_std(self, weights: Tensor) -> float:
        """Standard error of H at α [M], see `hgprompt.uncertainty`. OptionError: no finite tensor [M]."""
        return h_score_std(self.statistics, self.score, self._checked(weights))

    def solve(self, lam: float, *, warm: Sequence[Tensor] = ()) -> Solution:
        """The best of several starts for one λ.

        Args:
            lam: λ ≥ 0.
            warm: weights [M] to start from too; what is found is no worse than they are.

        Raises:
            OptionError: a λ that is none, or weights that are not finite tensors [M].
        """
        check_lam(lam)
        return self._solve(lam, self._everyone, warm=[self._checked(w) for w in warm])

    def path(self, lams: Sequence[float]) -> list[Solution]:
        """Solutions along λ, in the order given. The largest λ is solved first, where the problem is closest to
        convex; each solution is one more start for the next (not by projected gradient, which has one start)."""
        if not isinstance(lams, Sequence):
            raise OptionError(f"lams must be a sequence of numbers, got {lams!r:.80}; solve takes a single λ")
        found: dict[float, Solution] = {}
        warm: list[Vector] = []
        for lam in sorted(set(lams), reverse=True):
            check_lam(lam)
            found[lam] = self._solve(lam, self._everyone, warm=warm)
            warm = self._warm(found[lam])
        return [found[lam] for lam in lams]

    def ablations(self, lam: float) -> dict[str, Solution]:
        """The rows of the paper's Table 2: "h_score" alone, "alignment" alone, "both".

        Alignment alone is least at uniform weights, whatever the gradients (see `alignment_loss`): no search is needed.

        Raises:
            OptionError: there are no gradients.
        """
        if self.alignment is None:
            raise OptionError("ablations need the Gram matrix of the gradients: pass gram")
        uniform = np.full(self.size, 1 / self.size)
        loss, slope = self.alignment(uniform)
        gap = simplex.frank_wolfe_gap(uniform, slope)
        aligned = Minimum(uniform, loss, gap, 0, 1, gap <= self.tolerance)
        return {
            "h_score": self.solve(0.0),
            "alignment": self._solution([aligned], self.alignment, evaluations=0),
            "both": self.solve(lam),
        }

    def leave_one_out(self, lam: float) -> list[Solution]:
        """For every prompt, the solution for the pool without it; weights [M] with 0 in its place.

        The shrinkage intensity stays that of the whole pool, so that H compares between the pools.

        Raises:
            OptionError: there is a single prompt.
        """
        if self.size < 2:
            raise OptionError("a pool of one prompt has none to leave out")
        warm = self._warm(self.solve(lam))
        return [self._solve(lam, np.delete(self._everyone, i), warm=warm) for i in range(self.size)]

    def jackknife(self, solution: Solution, fold_grams: Sequence[Tensor] | None, lam: float) -> Tensor:
        """Weights [folds, M] with each fold of the images left out, at the intensity of the whole.

        A fold's objective is taken to differ from the whole one by what its value and gradient differ by at the best
        local minima of the whole, from which it is minimised; what is neglected is of second order in the difference
        that a fold makes. By projected gradient, each fold's own objective is minimised from uniform weights, as
        Algorithm 1 starts.

        Args:
            solution: of `solve`, for the same λ.
            fold_grams: the Gram matrix without fold k, for every k; None: the H-score alone.
            lam: as for `solve`.

        Returns:
            NaN where there are fewer than two folds, or fewer than two images to a fold; and in the row of a fold
            without which fewer than two classes are left, or features that are the same for every image.
        """
        folds = self.statistics.folds
        if folds < 2 or self.statistics.num_images < 2 * folds:
            return torch.full((folds, self.size), torch.nan, dtype=torch.float64, device="cpu")
        alignments: list[Alignment | None] = [None] * folds
        if fold_grams is not None:
            alignments = [Alignment(of_unit_gradients(fold_grams[k], self.size).numpy()) for k in range(folds)]
        whole = Objective(self.score, self.alignment, lam, self.normalize)
        # λ stays what it is for the whole, also where a class has gone with the fold.
        folded = [dataclasses.replace(whole, alignment=alignment) for alignment in alignments]
        if self.solver == "projected-gradient":
            rows = []
            for k, objective in enumerate(folded):
                try:
                    score = HScore(self.statistics, shrinkage=self.score.intensity, without_fold=k)
                except (DataError, PromptError, StatisticsError):  # too little is left without the fold
                    rows.append(np.full(self.size, np.nan))
                    continue

                def without_fold(
                    weights: Vector, objective: Objective = objective, score: HScore = score
                ) -> tuple[float, Vector]:
                    return objective.of(score(weights), weights)

                rows.append(self._minimize(without_fold, np.full(self.size, 1 / self.size)).weights)
            return torch.from_numpy(np.stack(rows))
        # The folds' minima are shown to the basis together: where it cannot hold them, it would begin again for each.
        reduced = self._reduced if self._reduced is not None and self._reduced.points_at_once >= folds else None
        cheap = dataclasses.replace(whole, h_score=reduced or self.score)
        best = [(np.inf, np.full(self.size, np.nan)) for _ in range(folds)]
        minima = list(solution.diagnostics.local_minima[:_JACKKNIFE_STARTS].numpy())
        for minimum, without_folds in zip(minima, self.score.without_folds(minima), strict=True):
            value, gradient = whole(minimum)  # not the cheap one, which may have forgotten it
            known, tilted = [], []
            for k, found_k in enumerate(without_folds):
                if not np.isfinite(found_k[0]):
                    continue
                value_k, gradient_k = folded[k].of(found_k, minimum)
                known.append(k)
                tilted.append(_Tilted(cheap, minimum, value_k - value, gradient_k - gradient))
            if reduced is not None:
                reduced.show(minimum)
            reached = [self._refine(function, minimum) for function in tilted]
            if reduced is not None:
                reached = self._touch_down(tilted, reached, reduced)
            for k, found in zip(known, reached, strict=True):
                best[k] = min(best[k], (found.value, found.weights), key=lambda pair: pair[0])
        return torch.from_numpy(np.stack([weights for _, weights in best]))

    def _warm(self, solution: Solution) -> list[Vector]:
        """A start for a problem like the one that was solved. Projected gradient has none: it takes a fixed number of
        steps, so that its answers would depend on what was asked before."""
        return [] if self.solver == "projected-gradient" else [solution.weights.numpy()]

    def _checked(self, weights: Tensor) -> Vector:
        if not is_floating(weights, 1) or len(weights) != self.size or not bool(weights.isfinite().all()):
            raise OptionError(f"weights must be a finite floating point tensor [{self.size}], got {kind_of(weights)}")
        return weights.detach().double().cpu().numpy()

    @property
    def _everyone(self) -> NDArray[np.int64]:
        return np.arange(self.size)

    def _alignment_of(self, pool: NDArray[np.int64]) -> Alignment | None:
        """The alignment of some prompts with their own mean."""
        return None if self.alignment is None else Alignment(self.alignment.gram[np.ix_(pool, pool)])

    def _solve(self, lam: float, pool: NDArray[np.int64], *, warm: Sequence[Vector] = ()) -> Solution:
        """Minimise over the prompts of a pool; the others have no weight."""
        alignment = self._alignment_of(pool)
        reduced = self._reduced if self.solver == "quasi-newton" else None
        score = _PoolScore(reduced or self.score, pool, self.size)
        function = Objective(score, alignment, lam, self.normalize)
        before = self.score.evaluations
        starts = simplex.starting_points(function, len(pool), self.starts, self.seed)
        minima = [self._minimize(function, start) for start in starts]
        for start in (simplex.project(w[pool]) for w in warm):
            if reduced is not None:  # exact there, it leads nowhere worse; else it may not see what is good about it
                reduced.show(score.on_all(start))
            minima.append(self._minimize(function, start))
        if reduced is not None:
            minima = self._touch_down([function] * len(minima), minima, reduced, score)
        minima = [dataclasses.replace(m, weights=score.on_all(m.weights)) for m in minima]
        solution = self._solution(minima, alignment, self.score.evaluations - before, pool)
        found = solution.diagnostics
        if not found.converged and self.solver != "projected-gradient":
            logger.warning("α stopped at a gap of %.2g, above the tolerance of %.2g", found.gap, self.tolerance)
        return solution

    def _touch_down(
        self,
        functions: Sequence[Function],
        minima: Sequence[Minimum],
        reduced: ReducedHScore,
        score: _PoolScore | None = None,
    ) -> list[Minimum]:
        """Minima of confined objectives → minima of the whole ones: show the basis the points found and go on from
        there, until the gap there, which is then the whole objective's own, is small enough."""
        leaders, leader_of = _distinct([m.weights for m in minima], functions)
        points, functions = [minima[k].weights for k in leaders], [functions[k] for k in leaders]
        reached: list[Minimum | None] = [None] * len(points)
        for rounds in range(1, _ROUNDS + 1):
            unfinished = [k for k in range(len(points)) if reached[k] is None]
            for at in range(0, len(unfinished), reduced.points_at_once):
                some = unfinished[at : at + reduced.points_at_once]
                reduced.show(*(points[k] if score is None else score.on_all(points[k]) for k in some))
                for k in some:
                    value, gradient = functions[k](points[k])
                    gap = simplex.frank_wolfe_gap(points[k], gradient)
                    here = Minimum(points[k], value, gap, rounds, rounds, gap <= self.tolerance)
                    further = here if here.converged else self._refine(functions[k], points[k])
                    if further.value >= value or rounds == _ROUNDS:  # converged, or out of float64's digits
                        reached[k] = here
                    else:
                        points[k] = further.weights
            # What the basis kept apart may have come together with every direction that was added.
            first, group_of = _distinct(points, functions)
            leader_of = [group_of[k] for k in leader_of]
            points, reached = [points[k] for k in first], [reached[k] for k in first]
            functions = [functions[k] for k in first]
        found = [m for m in reached if m is not None]
        return [found[k] for k in leader_of]

    def _minimize(self, function: Function, start: Vector) -> Minimum:
        if self.solver == "projected-gradient":
            found = simplex.projected_gradient(function, start, learning_rate=self.learning_rate, steps=self.max_steps)
            return dataclasses.replace(found, converged=found.gap <= self.tolerance)  # which it does not stop at
        if self.solver == "exponentiated-gradient":
            steps = 10 * self.max_steps
            return simplex.exponentiated_gradient(function, start, tolerance=self.tolerance, max_steps=steps)
        return self._refine(function, start)

    def _refine(self, function: Function, start: Vector) -> Minimum:
        """From close to a minimum, whatever solver came there: a few evaluations."""
        return simplex.quasi_newton(function, start, tolerance=self.tolerance, max_steps=self.max_steps)

    def _solution(
        self,
        minima: Sequence[Minimum],
        alignment: Alignment | None,
        evaluations: int,
        pool: NDArray[np.int64] | None = None,
    ) -> Solution:
        minima = sorted(minima, key=lambda m: m.value)
        best = minima[0]
        inside = best.weights if pool is None else best.weights[pool]
        distinct = [minima[k].weights for k in _distinct([m.weights for m in minima])[0]]
        diagnostics = Diagnostics(
            objective=best.value,
            h_score=self.score.evaluate(best.weights)[0],
            alignment_loss=float("nan") if alignment is None else alignment(inside)[0],
            gap=best.gap,
            converged=best.converged,
            intensity=self.score.intensity,
            source_h_scores=self.source_h_scores,
            uniform_h_score=self.uniform_h_score,
            start_objectives=tuple(m.value for m in minima),
            local_minima=torch.from_numpy(np.stack(distinct)),
            evaluations=evaluations,
        )
        return Solution(torch.from_numpy(best.weights.copy()), diagnostics)


class _PoolScore:
    """An H-score as a function of the weights of some prompts; the others have none."""

    def __init__(self, score: HScore | ReducedHScore, pool: NDArray[np.int64], size: int) -> None:
        self.score, self.pool, self.size = score, pool, size
        self.num_classes = score.num_classes

    def on_all(self, weights: Vector) -> Vector:
        """Weights of the pool's prompts → of all, [M]."""
        point = np.zeros(self.size)
        point[self.pool] = weights
        return point

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        if isinstance(self.score, ReducedHScore) and len(self.pool) < self.size:
            return self.score.within(self.pool, weights)
        value, gradient = self.score(self.on_all(weights))
        return value, gradient[self.pool]


@dataclass(frozen=True)
class _Tilted:
    """A function plus a linear one that is known at a point."""

    function: Function
    point: Vector
    value: float
    gradient: Vector

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        value, gradient = self.function(weights)
        return value + self.value + float(self.gradient @ (weights - self.point)), gradient + self.gradient


def jackknife_std(weights_without_fold: Tensor) -> Tensor:
    """Standard error of α [M] by the delete-one-group jackknife, from `WeightProblem.jackknife` [folds, M]."""
    folds = len(weights_without_fold)
    return ((folds - 1) * weights_without_fold.var(dim=0, correction=0)).sqrt()


def check_problem(
    shrinkage: Shrinkage, solver: Solver, starts: int, tolerance: float, max_steps: int, learning_rate: float, seed: int
) -> None:
    """Raise OptionError for what no `WeightProblem` can be made of."""
    for name, value in {"tolerance": tolerance, "learning_rate": learning_rate}.items():
        real(name, value)
    for name, value in {"starts": starts, "max_steps": max_steps, "seed": seed}.items():
        whole(name, value)
    check_shrinkage(shrinkage)
    if solver not in ("quasi-newton", "exponentiated-gradient", "projected-gradient"):
        raise OptionError(
            f"solver must be 'quasi-newton', 'exponentiated-gradient' or 'projected-gradient', got {solver!r}"
        )
    if starts < 1:
        raise OptionError(f"starts must be at least 1, got {starts}")
    if not 0 <= tolerance < math.inf:
        raise OptionError(f"the tolerance of the Frank–Wolfe gap must be a number from 0 on, got {tolerance}")
    if max_steps < 1:
        raise OptionError(f"max_steps must be at least 1, got {max_steps}")
    if not 0 < learning_rate < math.inf:
        raise OptionError(f"learning_rate must be a number above 0, got {learning_rate}")
    if not 0 <= seed < 2**63:
        raise OptionError(f"seed must be from 0 to 2^63 - 1, got {seed}")


def check_lam(lam: float) -> None:
    """Raise OptionError for a λ that no problem can be asked for."""
    if not 0 <= real("lam", lam) <= MAX_LAM:
        raise OptionError(f"lam must be a number from 0 to {MAX_LAM:g}, got {lam}")


def _distinct(points: Sequence[Vector], functions: Sequence[Function] | None = None) -> tuple[list[int], list[int]]:
    """The first of every group of points (of one function) that lie together; and for each point, which of the groups
    is its own."""
    leaders: list[int] = []
    leader_of = []
    for k, point in enumerate(points):
        own = [g for g, j in enumerate(leaders) if functions is None or functions[j] is functions[k]]
        near = [g for g in own if np.abs(points[leaders[g]] - point).sum() < _SAME]
        if not near:
            leaders.append(k)
        leader_of.append(near[0] if near else len(leaders) - 1)
    return leaders, leader_of
