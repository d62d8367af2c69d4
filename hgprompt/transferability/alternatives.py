"""Alternatives to the gradient alignment of Eq. 10: functions of α that say something of the gradients.

Eq. 10 is least at uniform weights whatever the gradients are, because its target, the mean of the ĝ_i, is made of the
prompts that it judges. More generally, any fixed target Σ β_i ĝ_i gives back its own β. What follows has optima that
depend on the data. With g_α = Σ α_i ĝ_i as in Eq. 9:

| class | minimises | source |
|---|---|---|
| `TargetAlignment` | 1 - cos(g_α, t), with t from outside the pool | Eq. 10 with another target |
| `CrossFoldAlignment` | 1 - cosine with the other prompts' ĝ_i on other images | Eq. 10, cross-validated |
| `MinNorm` | ‖g_α‖² | Désidéri 2012; Sener & Koltun 2018 |
| `GradientVariance` | the share of ‖g_α‖² that folds disagree on | inspired by the paper's later versions |
| `FisherMatching` | ‖Σ α_i F̂_i - F̂_t‖² of diagonal Fisher information | inspired by the paper's later versions |
| `Entropy` | ± Σ α_i log α_i | Shannon 1948 |
| `TraceRatio` | -tr B(α) / tr Σ(α) of mixed features | Wu et al., H-ensemble, AAAI 2024 |

Each is called with α [M] (numpy float64, not negative, not all zero) and returns its value and its gradient [M], as
`hgprompt.simplex` and the second term of `hgprompt.objective.Objective` take it. They hold small float64 arrays, never
gradients. `top_k` makes a sparse α of any α.

    objective = Objective(HScore(statistics), CrossFoldAlignment.from_gradients(gradients), lam=0.1)
    weights = simplex.quasi_newton(objective, np.full(M, 1 / M)).weights
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from hgprompt import simplex
from hgprompt.arguments import kind_of
from hgprompt.errors import DataError, OptionError, PromptError
from hgprompt.objective import cosine_loss, gram_of, mixture_from
from hgprompt.simplex import Vector
from hgprompt.statistics import EnsembleStatistics

Matrix = NDArray[np.float64]


class TargetAlignment:
    """1 - cos(g_α, t) = 1 - cᵀα / √(αᵀKα), for a target direction t that no prompt's gradient is part of.

    Such a t is, for one, the gradient of the uniform mixture's prompt Σ P_i / M on images that were held out. At the
    minimum g_α is the direction nearest to t that the prompts can make: t projected onto the cone of the ĝ_i. Where
    cᵀα > 0 the loss is pseudo-convex: every stationary point there is a minimum. With t = Σ ĝ_i it is Eq. 10 up to two
    constants, and least at uniform weights.

    Args:
        gram: K [M, M] of the ĝ_i, numpy or torch (`hgprompt.gram_of`). A prompt without a direction has a zero row; its
            weight has no effect.
        along: c [M], ⟨ĝ_i, t / ‖t‖⟩.

    The value is in [0, 2], the scale of α does not matter; where g_α = 0 it is 1, with gradient 0.

    Raises:
        OptionError: shapes, values that are not finite, or cosines beyond what K allows. PromptError: K is zero.
    """

    def __init__(self, gram: ArrayLike | Tensor, along: ArrayLike | Tensor) -> None:
        self.gram = _square("gram", gram)
        self.along = _vector("along", along, len(self.gram))
        _require_direction(np.diagonal(self.gram))
        # ⟨ĝ_i, t̂⟩ ≤ ‖ĝ_i‖; gradients in float32 keep that to 1e-6.
        if (np.abs(self.along) > np.sqrt(np.diagonal(self.gram)) + 1e-5).any():
            raise OptionError(
                f"along holds {np.abs(self.along).max():.4g}, more than a cosine can be: normalise the gradients and t"
            )

    @classmethod
    def from_gradients(cls, gradients: Tensor, target: Tensor) -> TargetAlignment:
        """From gradients [M, ...] and t [...], floating point; both are normalised here, in float64.

        Raises:
            DataError: gradients that are not finite. OptionError: shapes. PromptError: t or every gradient is zero.
        """
        g = _unit(_flat(gradients, 1))
        t = _unit(_flat(target[None], 1))[0]
        _require_same_size(g, t)
        if not bool(t.any()):
            raise PromptError("the target's gradient is zero: it has no direction to align with")
        return cls(g @ g.T, (g @ t).clamp(-1, 1))

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → loss and gradient [M]."""
        return cosine_loss(self.along, self.gram, weights)


class CrossFoldAlignment:
    """Eq. 10, cross-validated: does the rest of the mixture point where prompt i points on other images?

    With ĝ_i^k, the unit gradient of prompt i on fold k, and ĝ_i^-k, that on all other folds, over k and i:

        L(α) = 1 - Σ ⟨Σ_{j≠i} α_j ĝ_j^k, ĝ_i^-k⟩ / √(Σ ‖Σ_{j≠i} α_j ĝ_j^k‖² · Σ ‖ĝ_i^-k‖²)

    It is one cosine, of all mixtures laid end to end with all their targets. At the minimum weight lies on prompts
    whose directions others share and that come back on other images. A prompt that is noise adds to the length and not
    to the product, and so does one that stands alone: both lose their weight. Where gradients are exact the minimum is
    uniform only if every prompt agrees with the others equally much; where none agrees with another, L is 1 for every
    α. Of prompts that are the same, an even split is best: mixtures and targets should be of like lengths.

    The plainer form, `leave_own_out=False`, holds g_α^k against the mean direction of all prompts on the other folds:

        L(α) = 1 - Σ ⟨g_α^k, t^k⟩ / √(Σ ‖g_α^k‖² · Σ ‖t^k‖²),   t^k = Σ_i ĝ_i^-k / ‖Σ_i ĝ_i^-k‖

    It rewards reproducible prompts also where none agrees with another, and how weight is split among prompts that are
    the same has no effect. But noise is all that it sees: with more images ĝ_i^k and ĝ_i^-k become one, and the minimum
    becomes Eq. 10's, uniform whatever the gradients are.

    Both are 1 - cᵀα / √(αᵀDα), in [0, 2], pseudo-convex where cᵀα > 0, and do not depend on the scale of α; a mean of
    one cosine per fold would not be pseudo-convex. Made by `from_gradients`.

    Args:
        gram: D [M, M]. along: c [M]. Numpy or torch.

    Raises:
        OptionError: shapes, or values that are not finite. PromptError: D is zero.
    """

    def __init__(self, gram: ArrayLike | Tensor, along: ArrayLike | Tensor) -> None:
        self.gram = _square("gram", gram)
        self.along = _vector("along", along, len(self.gram))
        _require_direction(np.diagonal(self.gram))

    @classmethod
    def from_gradients(cls, gradients: Tensor, *, leave_own_out: bool = True) -> CrossFoldAlignment:
        """From gradients [folds, M, ...], floating point, each the sum over the images of one fold.

        A fold without images (all zero) is left out; so is, of the targets, a prompt whose gradient is zero.

        Args:
            gradients: as above. leave_own_out: a prompt's own gradient is no part of its target.

        Raises:
            DataError: gradients that are not finite. OptionError: fewer than two folds with images. PromptError:
                no prompt has a direction, or one alone where its own is left out.
        """
        g = _folds(gradients, "cross-validation needs another fold to compare with")
        here, there = _unit(g), _unit(g.sum(0) - g)  # [folds, M, D]
        _require_direction(here.square().sum((0, 2)))
        grams = here @ here.mT
        if not leave_own_out:
            target = _unit(there.sum(1))
            kept = target.square().sum(1)  # 1, or 0 where the other folds' directions cancel
            if not bool(kept.any()):
                raise PromptError("the prompts' gradients cancel on every fold: their mean has no direction")
            c = torch.einsum("kmd,kd->m", here, target) / kept.sum().sqrt()
            return cls(torch.einsum("k,kij->ij", kept, grams), c)
        targets = (there.square().sum(2) > 0).to(g)  # [folds, M], 1 where there is one
        if int((targets.sum(0) > 0).sum()) < 2:
            raise PromptError(
                "only one prompt has a direction, and its own is left out: pass at least two, or leave_own_out=False"
            )
        products = here @ there.mT
        own = torch.diag_embed(products.diagonal(dim1=1, dim2=2))
        c = (products - own).sum((0, 2)) / targets.sum().sqrt()
        # Σ_i ‖g_α - α_i ĝ_i‖² over the targets i, multiplied out.
        crossed = targets[:, :, None] + targets[:, None, :]
        lengths = targets.sum(1)[:, None, None] * grams - crossed * grams
        lengths = lengths + torch.diag_embed(targets * grams.diagonal(dim1=1, dim2=2))
        return cls(lengths.sum(0), c)

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → loss and gradient [M]."""
        return cosine_loss(self.along, self.gram, weights)


class MinNorm:
    """‖g_α‖² = αᵀKα: the multiple-gradient descent of Désidéri (2012) and Sener & Koltun (NeurIPS 2018). Convex.

    At the minimum g_α is the shortest vector in the convex hull of the gradients. A step along -g_α then lowers the
    loss of every prompt that has weight equally fast, the others' no slower; at 0, no step lowers them all. Gradients
    that cancel are favoured, so this is the opposite of an alignment. Taken as they are and not normalised, short
    gradients are favoured too.

    Args:
        gram: K [M, M], ⟨g_i, g_j⟩, numpy or torch; of the ĝ_i (`hgprompt.gram_of`) or of the gradients themselves.

    The value grows with the square of α's scale: minimise it on the simplex.

    Raises:
        OptionError: shape, or values that are not finite. PromptError: a prompt whose gradient is zero; with all weight
            on it, the norm is 0 and says nothing.
    """

    def __init__(self, gram: ArrayLike | Tensor) -> None:
        self.gram = _square("gram", gram)
        _require_all(np.diagonal(self.gram) > 0, "have a zero gradient, with which the least norm is 0")

    @classmethod
    def from_gradients(cls, gradients: Tensor, *, normalize: bool = True) -> MinNorm:
        """From gradients [M, ...], floating point; normalised as in Eq. 8, or taken as they are.

        Raises:
            DataError: gradients that are not finite. PromptError: a gradient is zero.
        """
        g = _flat(gradients, 1)
        return cls(gram_of(g) if normalize else g @ g.T)

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → ‖g_α‖² and gradient [M]."""
        slope = self.gram @ weights
        return max(float(weights @ slope), 0.0), 2 * slope


class GradientVariance:
    """The share of the mixed gradient's square that folds disagree on: with g_α^k = Σ α_i g_i^k and its mean ḡ_α,

        V(α) = Σ_k ‖g_α^k - ḡ_α‖² / Σ_k ‖g_α^k‖² = αᵀVα / αᵀSα

    0 where all folds give the same gradient, 1 where their mean is zero; 1/V - 1 = ‖ḡ_α‖² / (variance over folds) is
    the signal beside the noise. At the minimum the mixture's gradient is the one that is reproduced best: noisy prompts
    lose their weight, prompts whose noise is independent share theirs. Where gradients are exact, V is 0 for every α.
    Not convex. Inspired by the gradient variance of the paper's later versions, not equal to it.

    Args:
        variance: V [M, M], Σ_k ⟨g_i^k - ḡ_i, g_j^k - ḡ_j⟩. square: S [M, M], Σ_k ⟨g_i^k, g_j^k⟩. Numpy or torch.

    The value does not depend on the scale of α; where every g_α^k = 0 it is 1, with gradient 0.

    Raises:
        OptionError: shapes, values that are not finite, or more variance than squares. PromptError: S is zero.
    """

    def __init__(self, variance: ArrayLike | Tensor, square: ArrayLike | Tensor) -> None:
        self.variance, self.square = _square("variance", variance), _square("square", square)
        _require_same_size(self.variance, self.square)
        _require_direction(np.diagonal(self.square))
        if (np.diagonal(self.variance) > np.diagonal(self.square) * (1 + 1e-9)).any():
            raise OptionError("variance exceeds the mean square: both must be sums over the same folds")

    @classmethod
    def from_gradients(cls, gradients: Tensor, *, normalize: bool = True) -> GradientVariance:
        """From gradients [folds, M, ...], floating point, each over equally many images.

        Args:
            gradients: as above. A fold without images (all zero) is left out.
            normalize: the g_i^k are unit gradients, as in Eq. 8, or as they are. (Divided by the norm of its mean, a
                prompt that is nothing but noise would outgrow all others.)

        Raises:
            DataError: gradients that are not finite. OptionError: fewer than two folds with images. PromptError: no
                prompt has a direction.
        """
        g = _folds(gradients, "one fold has no variance")
        if normalize:
            g = _unit(g)
        deviations = g - g.mean(0)
        variance, square = (torch.einsum("kid,kjd->ij", x, x) for x in (deviations, g))
        return cls(variance, square)

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → share and gradient [M]."""
        return _quotient(self.variance, self.square, weights, 1.0)


class FisherMatching:
    """‖Σ α_i F̂_i - F̂_t‖² = αᵀGα - 2 bᵀα + 1, with F̂ = F / ‖F‖ of diagonal empirical Fisher information F. Convex.

    F is the mean of squared gradients, entry by entry: which entries of a prompt the loss depends on, and how much. At
    the minimum the mixture of the prompts' profiles is nearest to the target's: F̂_t projected onto the convex hull of
    the F̂_i. F has no negative entry, so all of them agree to a degree: it is differences of the value that tell.
    Inspired by the Fisher matching of the paper's later versions, not equal to it.

    Args:
        gram: G [M, M], ⟨F̂_i, F̂_j⟩, numpy or torch, with diagonal 1. along: b [M], ⟨F̂_i, F̂_t⟩.

    The value depends on the scale of α: minimise it on the simplex.

    Raises:
        OptionError: shapes, values that are not finite. PromptError: a prompt whose Fisher information is zero; its
            weight would shorten the sum and do nothing else.
    """

    def __init__(self, gram: ArrayLike | Tensor, along: ArrayLike | Tensor) -> None:
        self.gram = _square("gram", gram)
        self.along = _vector("along", along, len(self.gram))
        _require_all(np.diagonal(self.gram) > 0, "have a Fisher information of zero")
        # In float32, products of unit vectors are 1 to about 1e-6.
        if (np.abs(np.diagonal(self.gram) - 1) > 1e-5).any() or (np.abs(self.along) > 1 + 1e-5).any():
            raise OptionError("gram and along must be products of F / ‖F‖: normalise the Fisher informations")

    @classmethod
    def from_gradients(cls, gradients: Tensor, target: Tensor) -> FisherMatching:
        """From gradients [n, M, ...] of the pool and [n', ...] of the target, floating point, over images or folds.

        Gradients of single images give the empirical Fisher information. Those of folds average first and square then:
        a coarser estimate, with the mean gradient in it.

        Raises:
            DataError: gradients that are not finite. OptionError: shapes. PromptError: F_t or some F_i is zero.
        """
        f = _unit(_flat(gradients, 2).square().mean(0))
        t = _unit(_flat(target, 1).square().mean(0))
        _require_same_size(f, t)
        if not bool(t.any()):
            raise PromptError("the target's Fisher information is zero: there is nothing to match")
        return cls(f @ f.T, f @ t)

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → squared distance and gradient [M]."""
        slope = self.gram @ weights
        value = float(weights @ slope) - 2 * float(self.along @ weights) + 1
        return max(value, 0.0), 2 * (slope - self.along)


class Entropy:
    """Σ α_i log α_i, minus the entropy of α: a pull towards uniform weights, or away from them.

    Towards uniform it is convex and least there, at -log M. Away from it, -Σ α_i log α_i is concave, and its minima, at
    0, are the single prompts. At α_i = 0 the value is its limit, 0, and the gradient, infinite there, that of 1e-300.

    Args:
        towards_uniform: the sign.
    """

    def __init__(self, *, towards_uniform: bool = True) -> None:
        self.towards_uniform = towards_uniform

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → value and gradient [M]."""
        logs = np.log(np.maximum(weights, 1e-300))
        sign = 1.0 if self.towards_uniform else -1.0
        return sign * float(weights @ logs), sign * (logs + 1)


class TraceRatio:
    """-tr B(α) / tr Σ(α) = -αᵀBα / αᵀTα: H-ensemble's objective (Wu et al., AAAI 2024) for mixed features Σ α_i f_i.

    tr B / tr Σ is the share of the mixed features' variance that lies between classes (`trace_ratio`); its negative is
    given, so that all functions here are minimised. At the minimum, classes lie farthest apart beside the spread within
    them, with no eye for correlations. Not convex. It takes the place of the H-score rather than of Eq. 10.

    Args:
        between: B [M, M], ⟨R_i, R_j⟩ with rows √π_c (class mean of f_i - mean of f_i). total: T [M, M], tr C_ij of the
            features' cross-covariances. Numpy or torch.

    The value is in [-1, 0] and does not depend on the scale of α; where Σ α_i f_i is constant it is 0, with gradient 0.

    Raises:
        OptionError: shapes, values that are not finite. PromptError: a prompt whose features are constant.
    """

    def __init__(self, between: ArrayLike | Tensor, total: ArrayLike | Tensor) -> None:
        self.between, self.total = _square("between", between), _square("total", total)
        _require_same_size(self.between, self.total)
        _require_all(np.diagonal(self.total) > 0, "give the same feature for every image")

    @classmethod
    def from_statistics(cls, statistics: EnsembleStatistics, without_fold: int | None = None) -> TraceRatio:
        """From the statistics of one pass, whichever representation they keep, optionally without one fold.

        Raises:
            DataError: fewer than two classes. PromptError: a prompt whose features are constant. StatisticsError: the
                statistics are empty.
        """
        mixture = mixture_from(statistics, without_fold)
        if mixture.r.shape[1] < 2:
            raise DataError(f"a trace ratio needs images of at least two classes, got {mixture.r.shape[1]}")
        _require_all((mixture.spread > mixture.noise).cpu().numpy(), "give the same feature for every image")
        r = mixture.r.flatten(1)
        return cls(r @ r.T, mixture.traces)

    def __call__(self, weights: Vector) -> tuple[float, Vector]:
        """α [M] → -tr B / tr Σ and gradient [M]."""
        value, gradient = _quotient(self.between, self.total, weights, 0.0)
        return -value, -gradient


def top_k(weights: ArrayLike | Tensor, k: int) -> Vector:
    """The nearest point to `weights` on the simplex with at most k entries that are not zero, [M] float64.

    Keep the k largest and project those onto the simplex: the greedy selector of Kyrillidis, Becker, Cevher & Koch
    (ICML 2013, "Sparse projections onto the simplex"), which they prove to be exact. What is taken away is added evenly
    to what is kept, not in proportion.

    Args:
        weights: [M], any numbers, numpy or torch; of equal entries the first are kept.
        k: from 1 to M.

    Raises:
        OptionError: weights that are no finite vector, or k out of range.
    """
    point = _array(weights)
    if point.ndim != 1 or not len(point) or not np.isfinite(point).all():
        raise OptionError(f"weights must be a finite vector [M], got shape {list(point.shape)}")
    if not 1 <= k <= len(point):
        raise OptionError(f"k must be from 1 to {len(point)}, the number of weights, got {k}")
    kept = np.argsort(-point, kind="stable")[:k]
    sparse = np.zeros_like(point)
    sparse[kept] = simplex.project(point[kept])
    return sparse


def _quotient(top: Matrix, bottom: Matrix, weights: Vector, otherwise: float) -> tuple[float, Vector]:
    """αᵀ top α / αᵀ bottom α and its gradient; where the denominator is zero, `otherwise` and no gradient."""
    up, down = top @ weights, bottom @ weights
    square = float(weights @ down)
    if square <= 1e-30 * float(np.abs(bottom).max()):
        return otherwise, np.zeros_like(weights)
    value = float(weights @ up) / square
    return value, 2 * (up - value * down) / square


def _array(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.array(values, dtype=np.float64)


def _square(name: str, values: ArrayLike | Tensor) -> Matrix:
    """A symmetric matrix [M, M] with a diagonal that is not negative, in float64; symmetric to the last bit."""
    matrix = _array(values)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise OptionError(f"{name} must be a matrix [M, M], got shape {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise OptionError(f"{name} holds NaN or infinity")
    # Products in float32 leave about 1e-6.
    if np.abs(matrix - matrix.T).max() > 1e-5 * np.abs(matrix).max() or np.diagonal(matrix).min() < 0:
        raise OptionError(f"{name} must be symmetric with a diagonal that is not negative: it holds inner products")
    return (matrix + matrix.T) / 2


def _vector(name: str, values: ArrayLike | Tensor, size: int) -> Vector:
    vector = _array(values)
    if vector.shape != (size,) or not np.isfinite(vector).all():
        raise OptionError(f"{name} must be finite, [{size}] for {size} prompts, got shape {list(vector.shape)}")
    return vector


def _flat(gradients: Tensor, leading: int) -> Tensor:
    """[..., D] in float64: `leading` dimensions are kept, what follows is flattened."""
    if gradients.ndim <= leading or not gradients.is_floating_point() or not gradients.numel():
        shape = ", ".join([*("n", "M")[2 - leading :], "..."])
        raise OptionError(f"gradients must be floating point [{shape}] and not empty, got {kind_of(gradients)}")
    if not bool(gradients.isfinite().all()):
        raise DataError("gradients are not finite: look for overflow in the head or the compute dtype")
    return gradients.detach().double().flatten(leading)


def _unit(gradients: Tensor) -> Tensor:
    """ĝ of Eq. 8, [..., D] in float64, for gradients [..., D]; a zero gradient has no direction and stays zero."""
    g = gradients.double()
    norms = g.norm(dim=-1, keepdim=True)
    return torch.where(norms > 0, g / norms.clamp_min(1e-300), torch.zeros_like(g))


def _folds(gradients: Tensor, why: str) -> Tensor:
    """[folds, M, D] in float64, folds without images left out; at least two."""
    g = _flat(gradients, 2)
    if not bool(g.any()):
        raise PromptError("every gradient is zero: no direction to align")
    g = g[g.flatten(1).any(1)]
    if len(g) < 2:
        raise OptionError(f"{why}: gradients [folds, M, ...] must hold at least two folds with images, got {len(g)}")
    return g


def _require_same_size(first: Tensor | Matrix, second: Tensor | Matrix) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise OptionError(f"sizes differ: {list(first.shape)} beside {list(second.shape)}")


def _require_direction(squares: Tensor | Vector) -> None:
    if not bool((squares > 0).any()):
        raise PromptError("every gradient is zero: no direction to align")


def _require_all(good: NDArray[np.bool_], what: str) -> None:
    bad = np.nonzero(~good)[0].tolist()
    if bad:
        raise PromptError(f"prompts {bad} {what}: leave them out")
