"""H_a(α) at a small fraction of its cost: a reduced basis of discriminants.

H_a(α) is a maximum over discriminants Z [h, C] (`hgprompt.mixture`). Confined to a subspace of k directions, it is at
most H_a, and costs M²k² where the whole costs N h² + N M h; and it equals H_a, gradient included, at every α whose own
Z the subspace holds. So the confined objective bounds the whole one from above and touches it wherever it was shown.
Minimising it, showing it the point found, and going on from there decreases the whole objective in every round
(majorisation–minimisation; Hunter & Lange 2004, "A tutorial on MM algorithms"), and the Frank–Wolfe gap at a point that
was shown is the whole objective's own. A subspace of snapshots is what reduced-basis methods for parametric equations
use (Hesthaven, Rozza & Stamm 2016).

A dozen evaluations of the whole H-score then serve every start, every λ, and every pool with a prompt left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgprompt.mixture import FeatureMixture
from hgprompt.objective import HScore
from hgprompt.projection import FeatureProjection, MomentProjection, ProjectedMixture
from hgprompt.simplex import Vector

SMALLEST_WIDTH = 128
"""Below, the whole H-score is cheap enough."""
_LARGEST_BASIS = 384
_BLOCK_BYTES = 1 << 30
_SET_UP = 30  # evaluations of the whole H-score that setting a basis up may cost; it saves well over a hundred


class ReducedHScore:
    """H_a from below, exact where it was shown. Called like `HScore`.

    Args:
        score: the whole H-score.
        capacity: directions that the basis holds at most; where more are needed it starts again from the latest.
    """

    def __init__(self, score: HScore, capacity: int) -> None:
        self.score, self.capacity = score, capacity
        self.num_classes, self.intensity = score.num_classes, score.intensity
        self.basis: Tensor | None = None  # [h, k], orthonormal
        self._projection: FeatureProjection | MomentProjection
        if isinstance(score.mixture, FeatureMixture):
            self._projection = FeatureProjection(score.mixture)
        else:
            self._projection = MomentProjection(score.mixture)
        self._mixture: ProjectedMixture | None = None
        # Of the prompts that were asked for last.
        self._part: tuple[tuple[ProjectedMixture, tuple[int, ...]], ProjectedMixture] | None = None

    @staticmethod
    def capacity_for(score: HScore) -> int:
        """Directions that pay for an H-score of this size; 0 where none would."""
        m, c, h = score.mixture.r.shape
        pairs = m * (m + 1) // 2
        fits = int((2 * _BLOCK_BYTES / 8 / pairs) ** 0.5)  # pairs · k²/2 numbers
        n = score.mixture.n
        each = 6 * n * m * h + 2 * n * h * min(n, h)  # operations of one evaluation
        affordable = int((_SET_UP * each / (2 * n)) ** 0.5 / m)  # directions k to start with: 2 n (m k)² operations
        capacity = min(h // 2, _LARGEST_BASIS, fits, 2 * affordable)
        confined = (m * capacity // 2) ** 2  # operations in a basis that is half full; they wait for memory
        worth = h >= SMALLEST_WIDTH and score.intensity > 0 and 2 * c <= capacity and 10 * confined < each
        return capacity if worth else 0

    @property
    def points_at_once(self) -> int:
        """How many points fit into the basis with room to go on."""
        return max(self.capacity // (2 * self.num_classes), 1)

    def show(self, *points: Vector) -> None:
        """Evaluate the whole H-score at α [M] each, which makes this one exact there."""
        self.take([self.score.evaluate(p)[1] for p in points])

    def take(self, discriminants: Sequence[Tensor], besides: Sequence[Tensor] = ()) -> None:
        """Take discriminants Z [h, C] into the basis.

        Args:
            discriminants: exact from now on, as long as the basis does not start again.
            besides: of these only as many directions are taken in as there is room for.
        """
        needed = torch.cat([z.cpu() for z in discriminants], dim=1)
        known = 0 if self.basis is None else self.basis.shape[1]
        basis = _extended(self.basis, needed)
        if basis.shape[1] > self.capacity:
            known, basis = 0, _extended(None, needed)
        if besides:
            all_of_them = torch.cat([z.cpu() for z in besides], dim=1)
            left, size, _ = torch.linalg.svd(_outside(basis, all_of_them), full_matrices=False)
            room = max(self.capacity // 2 - basis.shape[1], 0)
            new = size > 1e-9 * all_of_them.norm(dim=0).max()  # and not rounding
            basis = _extended(basis, left[:, new][:, :room])
        if basis.shape[1] > known:
            self._mixture = self._projection.onto(basis, known)
        self.basis = basis

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → H confined to the basis, and its gradient [M]."""
        return self._evaluate(self._mixture, weights)

    def within(self, prompts: NDArray[np.int64], weights: Vector) -> tuple[float, Vector]:
        """The same in the weights of some prompts [m], the others having none, at the cost of m prompts."""
        if self._mixture is None:
            return self(weights)
        key = self._mixture, tuple(prompts.tolist())
        if self._part is None or self._part[0] != key:
            self._part = key, self._mixture.select(torch.from_numpy(prompts))
        return self._evaluate(self._part[1], weights)

    def _evaluate(self, mixture: ProjectedMixture | None, weights: Vector) -> tuple[float, Vector]:
        assert self.basis is not None, "nothing was shown yet"
        if mixture is None:  # no direction tells the classes apart
            return 0.0, np.zeros_like(weights)
        value, gradient = mixture.value_and_gradient(torch.from_numpy(weights), self.intensity)
        return value, gradient.numpy()


def _extended(basis: Tensor | None, directions: Tensor) -> Tensor:
    """An orthonormal basis of both."""
    if basis is None:
        basis = directions.new_zeros(len(directions), 0)
    outside = _outside(basis, directions / directions.norm(dim=0).clamp_min(1e-300))
    left, size, _ = torch.linalg.svd(outside, full_matrices=False)
    return torch.cat([basis, _outside(basis, left[:, size > 1e-9])], dim=1)


def _outside(basis: Tensor, directions: Tensor) -> Tensor:
    """The part of directions [h, c] at right angles to the basis; twice, because once leaves rounding behind."""
    for _ in range(2):
        directions = directions - basis @ (basis.T @ directions)
    return directions
