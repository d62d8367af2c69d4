"""H-score, gradient alignment, and their sum as functions of α, with gradients (Eqs. 4, 5, 8, 9, 10, 12).

Two facts shape this file. Neither features nor normalised gradients depend on α, so everything here is linear
algebra on what one pass left behind. And the H-score of Eq. 5 saturates at C-1 as soon as N-1 ≤ h, whatever the
features: the covariance is shrunk by default, towards the multiple of the identity with the same trace,

    H_a(α) = (1-a) · tr(Σ_a⁻¹ Σ_between),   Σ_a = (1-a) Σ + a (tr Σ / h) I,

so that 0 ≤ H_a ≤ C-1, and H_a does not change when α is scaled. The intensity a is estimated once, on the uniform
mixture, and is the same for every α and every source: with an intensity per source, sources could not be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from hgprompt.arguments import is_floating, kind_of
from hgprompt.batch_checks import check_labels
from hgprompt.errors import DataError, OptionError, PromptError
from hgprompt.kernels.gram import gram, gram_reference, of_unit_size
from hgprompt.mixture import (
    FeatureMixture,
    MomentMixture,
    class_means,
    inverse_spread,
    rounding_noise,
    singular_below,
)
from hgprompt.simplex import Function, Vector
from hgprompt.statistics import EnsembleStatistics

Shrinkage = Literal["auto", "ledoit-wolf", "oas"] | float
# Where features lie beyond, fourth powers and the squares of gradients leave float64's range.
_SMALLEST, _LARGEST = 1e-30, 1e30
# An intensity below is lost in the rounding of a singular covariance: it counts as 0.
_SINGULAR_BELOW = 1e-13
_GRAM_ROUNDING = 1e-3  # of cosines in bfloat16, and no mistake


def h_score(features: Tensor, labels: Tensor, *, shrinkage: Shrinkage = "auto") -> Tensor:
    """H-score of features for labels: tr(cov(f)⁻¹ cov(E[f|y])), Eq. 5, with shrinkage.

    Args:
        features: [N, h], floating point, of any scale; differentiable, at the intensity that they have, which is not
            differentiated where it is estimated. Computed in float64.
        labels: [N], integers from 0 on.
        shrinkage: "auto" (the default estimator), "ledoit-wolf", "oas", an intensity in [0, 1), or 0.0 for Eq. 5 to
            the letter (pseudo-inverse where the covariance is singular).

    Returns:
        [] float64, between 0 and C-1 for C observed classes.

    Raises:
        DataError: fewer than two classes, labels that are no class indices, features not finite or constant.
    """
    if not is_floating(features, 2) or not features.numel():
        raise DataError(f"features must be floating point [N, h] and not empty, got {kind_of(features)}")
    labels = check_labels(labels, len(features))
    if len(labels.unique()) < 2:
        raise DataError(f"an H-score needs at least two classes, got {len(labels.unique())} in {len(labels)} images")
    if not bool(features.isfinite().all()):
        raise DataError("features are not finite")
    f = features.double()
    n, h = f.shape
    f = f * _power_of_two(1 / f.detach().abs().max().clamp(1e-300, 1e300))
    magnitude = f.detach().square().sum() / n
    f = f - f.mean(0)
    f = f - f.mean(0)  # what rounding left of a mean far larger than the spread
    if bool(f.detach().square().sum() / n <= rounding_noise(magnitude, features.dtype)):
        raise DataError(
            "features are constant, the same for every image: they tell nothing about the labels; "
            "look for a model or a prompt that ignores the image"
        )
    second = f.detach().T @ f.detach() / n
    a = resolve_intensity(shrinkage, n, second, f.detach().square().sum(1).square().sum())
    a = 0.0 if a < _SINGULAR_BELOW else a
    covariance = (1 - a) * (f.T @ f) / n + a * f.square().sum() / (n * h) * torch.eye(h, dtype=f.dtype, device=f.device)
    scale = inverse_spread(covariance.detach().diagonal(), n)
    covariance, r = scale[:, None] * covariance * scale, class_means(f[None], labels)[0] * scale
    if a > 0:
        return (1 - a) * (r * torch.linalg.solve(covariance, r.T).T).sum()
    cutoff = singular_below(n, torch.linalg.eigvalsh(covariance.detach()))
    return (1 - a) * (r * (torch.linalg.pinv(covariance, hermitian=True, atol=cutoff, rtol=0.0) @ r.T).T).sum()


def alignment_loss(gradients: Tensor, weights: Tensor) -> Tensor:
    """Gradient alignment loss, Eqs. 8–10: mean over prompts of 1 - ⟨ĝ_i, ĝ_α⟩.

    It is least where g_α points along the mean of the ĝ_i, so at uniform weights, with value 1 - ‖mean ĝ_i‖: a pull
    towards the uniform ensemble, measured in the geometry of the gradients.

    Args:
        gradients: [M, ...], normalised here. A prompt whose gradient is zero has no direction and is left out.
        weights: α [M].

    Returns:
        [] float64, in [0, 2]; differentiable in both.

    Raises:
        OptionError: weights of another number, or not finite. PromptError: every gradient is zero.
        DataError: gradients of another shape, or one that is not finite.
    """
    _check_gradients(gradients)
    if not is_floating(weights, 1) or len(gradients) != len(weights):
        raise OptionError(f"{len(gradients)} gradients need weights [{len(gradients)}], got {kind_of(weights)}")
    if not bool(weights.isfinite().all()):
        raise OptionError("weights are not finite")
    g = gradients.double().flatten(1)
    if not bool(g.isfinite().all()):
        raise DataError("gradients are not finite")
    g = of_unit_size(g)
    norms = g.norm(dim=1)
    alive = norms > 0
    if not bool(alive.any()):
        raise PromptError("every gradient is zero: no direction to align")
    g = g[alive] / norms[alive, None]
    mixed = weights.to(g)[alive] @ g
    mixed = mixed / mixed.norm().clamp_min(1e-30)
    return (1 - g @ mixed).mean()


def gram_of(gradients: Tensor) -> Tensor:
    """Gram matrix K [M, M] (float64) of the normalised gradients [M, ...]; zero rows for zero gradients.

    Raises:
        DataError: gradients that are not floating point [M, ...].
    """
    _check_gradients(gradients)
    return (gram if gradients.is_cuda else gram_reference)(gradients)


def of_unit_gradients(gram: Tensor, size: int) -> Tensor:
    """The Gram matrix [M, M] of the same gradients, each of length 1 (Eq. 9), float64, on the CPU.

    Raises:
        OptionError: it can be of no gradients.
    """
    if not is_floating(gram, 2) or tuple(gram.shape) != (size, size):
        raise OptionError(f"gram must be floating point [{size}, {size}] for {size} prompts, got {kind_of(gram)}")
    own = gram.detach().double().cpu()
    if not bool(own.isfinite().all()):
        raise OptionError("gram is not finite: a gradient in it was not, or was zero")
    squares = own.diagonal()
    dead = squares == 0
    if bool((dead | ((squares - 1).abs() <= _GRAM_ROUNDING)).all()):
        unit = own
    else:
        scale = squares.clamp_min(1e-300).rsqrt()
        unit = scale[:, None] * own * scale
    possible = (
        bool((squares >= 0).all())
        and not bool(own[dead].any())
        and bool(((unit - unit.T).abs() <= _GRAM_ROUNDING).all())
        and float(torch.linalg.eigvalsh(unit)[0]) >= -_GRAM_ROUNDING
    )
    if not possible:
        raise OptionError(
            "gram is no Gram matrix of gradients: it must be symmetric and have no negative eigenvalue "
            "(hgprompt.objective.gram_of makes one)"
        )
    return unit


def _check_gradients(gradients: Tensor) -> None:
    if not isinstance(gradients, Tensor) or not gradients.is_floating_point() or gradients.ndim < 2:
        raise DataError(f"gradients must be floating point [M, ...], got {kind_of(gradients)}")


def resolve_intensity(shrinkage: Shrinkage, n: int, covariance: Tensor, fourth: Tensor) -> float:
    """Shrinkage intensity in [0, 1].

    Args:
        shrinkage: as for `h_score`.
        n: number of images.
        covariance: Σ [h, h] of centred features (divisor N).
        fourth: Σ_n ‖f_n‖⁴ of centred features, [].

    Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices"; OAS: Chen, Wiesel,
    Eldar & Hero 2010, "Shrinkage algorithms for MMSE covariance estimation", Eq. 23 as commonly implemented.
    """
    check_shrinkage(shrinkage)
    if isinstance(shrinkage, Real):
        return float(shrinkage)
    h = covariance.shape[0]
    square = float(covariance.square().sum())
    mean = float(covariance.trace()) / h
    distance = float(
        (covariance - mean * torch.eye(h, dtype=covariance.dtype, device=covariance.device)).square().sum()
    )
    if distance == 0:  # Σ is its own target, as with a single feature: shrinking it changes nothing
        return 0.0
    if shrinkage in ("auto", "ledoit-wolf"):
        intensity = (float(fourth) / n - square) / n / distance
    else:
        intensity = (square / h**2 + mean * mean) / ((n + 1) * distance / h**2)
    # Fully shrunk, Σ_a would be the same for all features and H_a = 0.
    return min(max(intensity, 0.0), 1.0 - 1e-12)


def check_shrinkage(shrinkage: Shrinkage) -> None:
    """Raise OptionError for anything that is no shrinkage."""
    number = isinstance(shrinkage, Real) and not isinstance(shrinkage, bool)
    if shrinkage not in ("auto", "ledoit-wolf", "oas") and not (number and 0 <= shrinkage < 1):  # type: ignore[operator]
        raise OptionError(f"shrinkage must be 'auto', 'ledoit-wolf', 'oas' or a number in [0, 1), got {shrinkage!r}")


class Score(Protocol):
    """H as a function of α, with its gradient."""

    @property
    def num_classes(self) -> int: ...

    def __call__(self, weights: Vector, /) -> tuple[float, Vector]: ...


def mixture_from(statistics: EnsembleStatistics, without_fold: int | None = None) -> FeatureMixture | MomentMixture:
    """The mixed features of one pass, whichever representation its statistics keep, optionally without one fold."""
    if statistics.keeps == "features":
        return FeatureMixture(*statistics.features_and_labels(without_fold))
    return MomentMixture(statistics.moments(without_fold), statistics.dtype)


class HScore:
    """H_a(α) of the mixed features Σα_i f_i, and its gradient, from the statistics of one pass.

    Args:
        statistics: of at least two classes.
        shrinkage: as for `h_score`; an estimated intensity is estimated on the uniform mixture.
        without_fold: leave the images of one fold out.

    Attributes:
        intensity: a. num_classes: C. num_images: N. evaluations: how often it was computed.

    Raises:
        DataError: fewer than two classes. PromptError: a prompt whose features are constant or out of range, or prompts
            whose features cancel one another in the uniform mixture.
    """

    def __init__(
        self,
        statistics: EnsembleStatistics,
        *,
        shrinkage: Shrinkage = "auto",
        without_fold: int | None = None,
    ) -> None:
        mixture = mixture_from(statistics, without_fold)
        self._statistics, self.mixture = statistics, mixture
        self.evaluations = 0
        self.num_images = mixture.n
        self.num_classes = mixture.r.shape[1]
        if self.num_classes < 2:
            raise DataError(f"an H-score needs at least two classes, got {self.num_classes} in {mixture.n} images")
        _check_prompts(mixture)
        covariance, fourth = mixture.uniform()
        uniform = torch.full_like(mixture.noise, 1 / len(mixture.noise))
        if mixture.is_constant(uniform, covariance.trace()):
            raise PromptError(
                "the prompts' features cancel one another: their mean is the same for every image; leave out a prompt "
                "that is the opposite of the others"
            )
        self.intensity = resolve_intensity(shrinkage, mixture.n, covariance, fourth)

    def without_folds(self, points: Sequence[Vector]) -> list[list[tuple[float, Vector]]]:
        """Several α [M] → for each, H and its gradient without the images of each fold in turn, at the same intensity;
        NaN where what is left has fewer than two classes, or the same mixed feature for every image."""
        folds, a = self._statistics.folds, self.intensity
        found: list[list[tuple[float, Vector]]] = [[] for _ in points]
        if isinstance(self.mixture, FeatureMixture):
            for weights, of_point in zip(points, found, strict=True):
                alpha = torch.from_numpy(weights)
                values, gradients = self.mixture.without_folds(self._statistics.fold_of, folds, alpha, a)
                of_point.extend(zip(values.tolist(), gradients.cpu().numpy(), strict=True))
            return found
        for k in range(folds):
            moments = self._statistics.moments(k)  # as long as the evaluations themselves: once for all points
            left = MomentMixture(moments, self._statistics.dtype) if moments.count else None
            for weights, of_point in zip(points, found, strict=True):
                alpha = torch.from_numpy(weights)
                if left is None or not left.tells_apart(alpha):
                    of_point.append((math.nan, np.full_like(weights, math.nan)))
                    continue
                value, gradient = left.value_and_gradient(alpha, a)
                of_point.append((value, gradient.cpu().numpy()))
        return found

    def evaluate(self, weights: Vector) -> tuple[float, Tensor]:
        """α [M] → H, and the discriminants Z [h, C] that it comes from (`hgprompt.mixture`)."""
        self.evaluations += 1
        value, z = self.mixture.discriminants(torch.from_numpy(weights), self.intensity)
        return self._at_most(value), z

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → H and its gradient [M]. The scale of α does not matter. Where the prompts cancel one another there is
        nothing to tell classes from, and both are 0."""
        self.evaluations += 1
        value, gradient = self.mixture.value_and_gradient(torch.from_numpy(weights), self.intensity)
        return self._at_most(value), gradient.cpu().numpy()

    def _at_most(self, value: float) -> float:
        """C - 1 for more than that, which is rounding: without shrinkage, of prompts that all but cancel one another. A
        maximum of H would be looked for there."""
        return min(value, self.num_classes - 1.0)


def _check_prompts(mixture: FeatureMixture | MomentMixture) -> None:
    """Raise PromptError for features that are constant or out of range."""
    spread = mixture.spread
    outside = ~((spread <= _LARGEST**2) & ((spread >= _SMALLEST**2) | (spread <= mixture.noise)))  # NaN is outside too
    for wrong, what in (
        (
            outside,
            f"have features that differ between images by less than {_SMALLEST:g} or more than {_LARGEST:g}, "
            "too far from 1 for sums of fourth powers: scale the features of all prompts by one factor",
        ),
        (
            spread <= mixture.noise,
            "give the same feature for every image: they carry nothing, or blow up the network; leave them out",
        ),
    ):
        if bool(wrong.any()):
            raise PromptError(f"prompts {torch.nonzero(wrong).flatten().tolist()} {what}")


def _power_of_two(number: Tensor) -> float:
    """The power of two next below: a factor that rounds nothing."""
    return 2.0 ** (math.frexp(float(number))[1] - 1)


@dataclass(frozen=True)
class Alignment:
    """L_align(α) of Eq. 10 and its gradient, from the Gram matrix K of normalised gradients: 1 - (1ᵀKα/M)/√(αᵀKα).

    Attributes:
        gram: K [M, M]; a zero diagonal entry marks a prompt without a direction, which is left out of the mean.
    """

    gram: Vector

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → loss and gradient [M]."""
        alive = np.diagonal(self.gram) > 0
        if not alive.any():
            return 0.0, np.zeros_like(weights)
        mean = self.gram[alive].mean(axis=0)  # ⟨mean ĝ, ĝ_i⟩
        return cosine_loss(mean, self.gram, weights)


def cosine_loss(along: Vector, gram: Vector, weights: Vector) -> tuple[float, Vector]:
    """1 - ⟨along, α⟩ / √(αᵀ gram α) and its gradient [M], for α [M]: 1 minus the length of ĝ_α along a fixed vector.

    Args:
        along: [M], of the vector with every ĝ_i. gram: [M, M], of the ĝ_i with one another.
        weights: α [M]; where Σ α_i ĝ_i = 0 there is no direction, the value is 1 and the gradient 0.
    """
    slope = gram @ weights
    square = float(weights @ slope)
    if square <= 1e-30:
        return 1.0, np.zeros_like(weights)
    norm = math.sqrt(square)
    cosine = float(along @ weights) / norm
    return max(1.0 - cosine, 0.0), -along / norm + cosine * slope / square


@dataclass(frozen=True)
class Objective:
    """-H(α)/(C-1) + λ L_align(α), or Eq. 12 to the letter with the raw H.

    Dividing by C-1, the largest value that H can take, makes one λ mean the same on 2 classes and on 100. In place of
    `Alignment` any function of α will do, such as the alternatives to Eq. 10 in `hgprompt.transferability`.
    """

    h_score: Score
    alignment: Function | None
    lam: float
    normalize: bool = True

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → value and gradient [M]."""
        return self.of(self.h_score(weights), weights)

    def of(self, h_score: tuple[float, Vector], weights: Vector) -> tuple[float, Vector]:
        """The same with an H and its gradient from elsewhere: without a fold, say."""
        scale = 1 / (self.h_score.num_classes - 1) if self.normalize else 1.0
        value, gradient = -scale * h_score[0], -scale * h_score[1]
        if self.alignment is not None and self.lam != 0:
            loss, slope = self.alignment(weights)
            value, gradient = value + self.lam * loss, gradient + self.lam * slope
        return value, gradient
