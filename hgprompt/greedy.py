"""Which prompts go best together, of a pool whose statistics are all there: by H of each alone, or by greedy search."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hgprompt.errors import OptionError
from hgprompt.objective import HScore, Objective, Shrinkage
from hgprompt.optimize import Solution, WeightProblem
from hgprompt.simplex import Vector, quasi_newton
from hgprompt.statistics import EnsembleStatistics

_NO_WEIGHT = 1e-6
_BEAM = 3  # mixtures that go on


@dataclass(frozen=True)
class Ranking:
    """All prompts of a pool in the order in which they are wanted.

    Attributes:
        order: prompt indices [κ], best first. weights: α [size] over the first of them, float64.
        objective: -H(α)/(C-1). h_score: H(α). intensity: of the shrinkage.
        alone: H of every prompt alone [κ], float64; NaN for those that halving eliminated.
    """

    order: Tensor
    weights: Tensor
    objective: float
    h_score: float
    intensity: float
    alone: Tensor


def greedy_selection(
    statistics: EnsembleStatistics,
    size: int,
    *,
    shrinkage: Shrinkage = "auto",
    tolerance: float = 1e-4,
) -> Ranking:
    """The prompts that minimise -H/(C-1) together, by greedy forward selection.

    A beam of mixtures grows by a prompt a step, from the prompts that are best alone. Each mixture is tried half and
    half with every candidate; over the best of these the objective is minimised, and three mixtures go on. What is
    tried is the objective itself: the discriminants of a prompt hardly see the classes that another one tells apart, so
    that a good pair often lies beyond a local minimum at each of the two, where no slope leads. Candidates are the
    prompts that are best alone and those that the best mixture wants most, by slope; over the one that it wants most
    the objective is minimised in any case. The prompts that are best alone are tried as a set, too. The search ends
    when a step gains nothing: the best mixtures are of few prompts. Prompts without weight follow, in turn those that
    are best alone and those that the minimum wants most.

    Args:
        statistics: of κ prompts. size: prompts to take, at most κ.
        shrinkage: as for `hgprompt.optimize_weights`. tolerance: Frank–Wolfe gap of each minimisation.

    Raises:
        OptionError: size is not from 1 to κ. DataError, PromptError: as for `hgprompt.optimize_weights`.
    """
    count = statistics.num_prompts
    check_size(size, count)
    score = HScore(statistics, shrinkage=shrinkage)
    alone = alone_scores(score, count)
    best_alone = (-alone).argsort(kind="stable").tolist()
    search = _Search(statistics, score, tolerance)
    best, ended = search.grow(best_alone, size), best_alone[:size]
    together = WeightProblem(statistics.select(ended), shrinkage=score.intensity, tolerance=tolerance).solve(0.0)
    if together.diagnostics.objective < best.value:
        best = _Mixture(together.diagnostics.objective, tuple(ended), together.weights.numpy())
    weights = search.on_all(best)
    wanted = search.slopes(best).argsort(kind="stable").tolist()
    taken = sorted(best.prompts, key=lambda i: -weights[i])
    order = list(dict.fromkeys(taken + in_turn(best_alone, wanted)))
    ready = torch.from_numpy(weights[order[:size]])
    found = torch.tensor(order, device="cpu")
    return Ranking(found, ready, best.value, score(weights)[0], score.intensity, torch.from_numpy(alone))


def ranking_by_h_score(statistics: EnsembleStatistics, size: int, *, shrinkage: Shrinkage = "auto") -> Ranking:
    """By the H-score of each prompt alone; weights are the best ones over the first `size`."""
    check_size(size, statistics.num_prompts)
    score = HScore(statistics, shrinkage=shrinkage)
    alone = torch.from_numpy(alone_scores(score, statistics.num_prompts))
    order = alone.argsort(descending=True, stable=True)
    weights, found = mixture_of(statistics, order[:size].tolist(), intensity=score.intensity)
    return Ranking(order, weights, found.objective, found.h_score, score.intensity, alone)


def mixture_of(
    statistics: EnsembleStatistics,
    prompts: Sequence[int],
    *,
    intensity: float,
    warm: Sequence[Tensor] = (),
    tolerance: float = 1e-4,
) -> Solution:
    """The best mixture of some prompts of a pool by H alone, at the intensity of the pool.

    Args:
        warm: weights over these prompts to start from too.
    """
    problem = WeightProblem(statistics.select(prompts), shrinkage=intensity, tolerance=tolerance)
    return problem.solve(0.0, warm=warm)


@dataclass(frozen=True)
class _Mixture:
    """Prompts, their weights [m], and the objective there."""

    value: float
    prompts: tuple[int, ...]
    weights: Vector


@dataclass(frozen=True)
class _Search:
    """The objective of few prompts among many, exact; and mixtures of them that grow."""

    statistics: EnsembleStatistics
    score: HScore
    tolerance: float

    def grow(self, best_alone: Sequence[int], size: int) -> _Mixture:
        """The best mixture found of at most `size` prompts."""
        beam = [self._at((i,), np.ones(1)) for i in best_alone[: 2 * _BEAM]]
        for _ in range(size - 1):
            leader = min(beam, key=_value)
            wanted = [i for i in self.slopes(leader).argsort(kind="stable").tolist() if i not in leader.prompts]
            candidates = dict.fromkeys([*best_alone[: 2 * size], *wanted[: size // 2]])
            trials: dict[frozenset[int], _Mixture] = {}
            for mixture in beam:
                for i in candidates:
                    key = frozenset((*mixture.prompts, i))
                    if i not in mixture.prompts and key not in trials:
                        trials[key] = self._half(mixture, i)
            promising = sorted(trials.values(), key=_value)[:_BEAM]
            promising += [self._half(leader, i) for i in wanted[:1]]
            grown = [self._minimised(mixture) for mixture in promising]
            before = min(map(_value, beam))
            distinct = {frozenset(m.prompts): m for m in sorted([*grown, *beam], key=_value, reverse=True)}
            beam = sorted(distinct.values(), key=_value)[:_BEAM]
            if beam[0].value > before - self.tolerance:
                break
        return beam[0]

    def on_all(self, mixture: _Mixture) -> Vector:
        """Weights over all prompts, [κ]."""
        weights = np.zeros(self.statistics.num_prompts)
        weights[list(mixture.prompts)] = mixture.weights
        return weights

    def slopes(self, mixture: _Mixture) -> Vector:
        """Of -H along every prompt [κ]."""
        return -self.score(self.on_all(mixture))[1]

    def _at(self, prompts: tuple[int, ...], weights: Vector) -> _Mixture:
        mixture = _Mixture(0.0, prompts, weights)
        value = -self.score.evaluate(self.on_all(mixture))[0] / (self.score.num_classes - 1)
        return dataclasses.replace(mixture, value=value)

    def _half(self, mixture: _Mixture, prompt: int) -> _Mixture:
        return self._at((*mixture.prompts, prompt), np.append(mixture.weights / 2, 0.5))

    def _minimised(self, mixture: _Mixture) -> _Mixture:
        part = HScore(self.statistics.select(list(mixture.prompts)), shrinkage=self.score.intensity)
        found = quasi_newton(Objective(part, None, 0.0), mixture.weights, tolerance=self.tolerance)
        kept = found.weights > _NO_WEIGHT
        weights = found.weights[kept] / found.weights[kept].sum()
        return _Mixture(found.value, tuple(np.array(mixture.prompts)[kept].tolist()), weights)


def _value(mixture: _Mixture) -> float:
    return mixture.value


def alone_scores(score: HScore, count: int) -> Vector:
    """H of every prompt alone, [κ]."""
    return np.array([score.evaluate(vertex)[0] for vertex in np.eye(count)])


def in_turn(*orders: Sequence[int]) -> list[int]:
    """Every index once, first come first served, from several orders of the same indices in turn."""
    return list(dict.fromkeys(i for row in zip(*orders, strict=True) for i in row))


def check_size(size: int, count: int) -> None:
    if not 1 <= size <= count:
        raise OptionError(f"size must be from 1 to the {count} prompts of the pool, got {size}")
