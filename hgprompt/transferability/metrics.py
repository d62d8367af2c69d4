"""Transferability metrics beside the H-score, for comparison: how promising are features, or a source model's outputs,
for a labelled target task? Larger is better in all of them.

| function | takes | source |
|---|---|---|
| `trace_ratio` | features | the H-score's surrogate in Wu et al., H-ensemble, AAAI 2024 |
| `log_me` | features | You et al., ICML 2021 |
| `transrate` | features | Huang et al., ICML 2022 |
| `leep` | a source classifier's probabilities | Nguyen et al., ICML 2020 |
| `nce` | a source classifier's labels | Tran et al., ICCV 2019 |

All compute in float64 on the features' device and return a Python float. `hgprompt.h_score` is the metric of the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hgprompt.arguments import is_floating, kind_of
from hgprompt.batch_checks import check_labels
from hgprompt.errors import DataError, OptionError
from hgprompt.moments import class_sums

__all__ = ["leep", "log_me", "nce", "trace_ratio", "transrate"]


def trace_ratio(features: Tensor, labels: Tensor) -> float:
    """tr cov(E[f | y]) / tr cov(f): the share of the features' variance that lies between classes, in [0, 1].

    Unlike the H-score it knows no correlations, needs no inverse and no shrinkage, and is not invariant to linear maps.

    Args:
        features: [N, h], floating point. labels: [N], integers.

    Raises:
        DataError: features that are not finite or constant, labels that are no class indices, fewer than two classes.
    """
    f, index, counts = _checked(features, labels)
    means = _class_means(f, index, counts)
    between = (counts[:, None] * means.square()).sum() / len(f)
    return float(between / (f.square().sum() / len(f)))


def log_me(features: Tensor, labels: Tensor, *, tolerance: float = 1e-10, max_steps: int = 1000) -> float:
    """LogME: the log evidence per image of Bayesian linear regression from features to one-vs-rest labels, maximised
    over the precisions α of the weights and β of the noise, averaged over classes.

        log p(y | F, α, β) = N/2 log β + h/2 log α - N/2 log 2π - β/2 ‖F m - y‖² - α/2 ‖m‖² - 1/2 log |A|,
        A = αI + βFᵀF,  m = β A⁻¹ Fᵀ y    (Eq. 2 of the paper)

    Features and labels are taken as they are, without a bias, as in the paper's code. The maximum is sought by
    MacKay's fixed point, in the singular basis of F.

    Args:
        features: [N, h], floating point. labels: [N], integers.
        tolerance: relative change of α/β at which the fixed point has converged. max_steps: at most.

    Raises:
        DataError: as `trace_ratio`. OptionError: a tolerance or number of steps that is not positive.
    """
    if not tolerance > 0 or max_steps < 1:
        raise OptionError(f"tolerance and max_steps must be positive, got {tolerance} and {max_steps}")
    centred, index, counts = _checked(features, labels)
    f = features.detach().to(centred)
    n, h = f.shape
    u, singular, _ = torch.linalg.svd(f, full_matrices=False)
    # The evidence knows no scale, and so must what the fixed point starts from; a power of two changes no digit.
    squares = (singular / 2.0 ** math.frexp(float(singular[0]))[1]).square()
    evidences = []
    for c in range(len(counts)):
        y = (index == c).to(f)
        evidences.append(_evidence(u.T @ y, float(y.square().sum()), squares, n, h, tolerance, max_steps))
    return sum(evidences) / len(evidences)


def _evidence(along: Tensor, length: float, squares: Tensor, n: int, h: int, tolerance: float, max_steps: int) -> float:
    """Largest log evidence per image for one target: `along` = Uᵀy, `length` = ‖y‖², `squares` = σ² of the features."""
    along = along.square()
    outside = max(length - float(along.sum()), 0.0)  # the part of y that no linear map of the features reaches
    ratio = 1.0  # α/β: all else follows from it
    for _ in range(max_steps):
        shrunk = squares / (squares + ratio)
        gamma = float(shrunk.sum())  # parameters that the data determine
        size = float((along * shrunk.square() / squares.clamp_min(1e-300)).sum())  # ‖m‖²
        residual = float((along * (1 - shrunk).square()).sum()) + outside  # ‖Fm - y‖²
        alpha = gamma / max(size, 1e-300)
        free = n - len(squares) + float((1 - shrunk).sum())  # N - γ, also where γ rounds to N
        beta = free / max(residual, 1e-12 * length)  # an exact fit would make β infinite
        new = alpha / beta
        done = abs(new - ratio) <= tolerance * ratio
        ratio = new
        if done:
            break
    shrunk = squares / (squares + ratio)
    size = float((along * shrunk.square() / squares.clamp_min(1e-300)).sum())
    residual = float((along * (1 - shrunk).square()).sum()) + outside
    # At the fixed point's ratio, the best β is known: both quadratic terms together are N/2.
    beta = n / max(residual + ratio * size, 1e-12 * length)
    alpha = ratio * beta
    log_det = float((alpha + beta * squares).log().sum()) + max(h - len(squares), 0) * math.log(alpha)
    quadratic = beta * residual + alpha * size
    return (n * math.log(beta) + h * math.log(alpha) - n * math.log(2 * math.pi) - quadratic - log_det) / (2 * n)


def transrate(features: Tensor, labels: Tensor, *, eps: float = 1e-4) -> float:
    """TransRate: mutual information of features and labels by coding rates.

        R(F, ε) = 1/2 log |I + FᵀF / (N ε)|,   TrR = R(F, ε) - Σ_c n_c/N R(F_c, ε)

    Args:
        features: [N, h], floating point; they are centred as a whole, as in the paper's code.
        labels: [N], integers. eps: ε > 0, the squared distortion.

    Raises:
        DataError: as `trace_ratio`. OptionError: eps is not positive.
    """
    if not eps > 0:
        raise OptionError(f"eps must be positive, got {eps}")
    f, index, counts = _checked(features, labels)
    within = sum(float(n) / len(f) * _coding_rate(f[index == c], eps) for c, n in enumerate(counts.tolist()))
    return _coding_rate(f, eps) - within


def _coding_rate(f: Tensor, eps: float) -> float:
    """1/2 log |I + FᵀF / (N ε)|, by the singular values of F."""
    return 0.5 * float((torch.linalg.svdvals(f).square() / (len(f) * eps)).log1p().sum())


def leep(probabilities: Tensor, labels: Tensor) -> float:
    """LEEP: mean log likelihood of the target labels under the empirical predictor of a source classifier.

        P(y, z) = 1/N Σ_{i: y_i = y} θ(x_i)_z,   LEEP = 1/N Σ_i log Σ_z P(y_i | z) θ(x_i)_z

    A source class that no image was given any probability of is left out: P(y | z) would be 0/0.

    Args:
        probabilities: θ(x_i), [N, Z], rows that sum to 1 (within 1e-3, or the rounding of their dtype).
        labels: [N], integers.

    Returns:
        At most 0.

    Raises:
        DataError: rows that are no probabilities, labels that are no class indices.
    """
    if not is_floating(probabilities, 2):
        raise DataError(f"probabilities must be floating point [N, Z], got {kind_of(probabilities)}")
    theta = probabilities.detach().double()
    if not bool(theta.isfinite().all()) or bool((theta < 0).any()):
        raise DataError(f"probabilities must be [N, Z], finite and not negative, got {list(theta.shape)}")
    total = theta.sum(1, keepdim=True)
    if len(theta) == 0 or bool(((total - 1).abs() > max(1e-3, 4 * torch.finfo(probabilities.dtype).eps)).any()):
        raise DataError("every row of probabilities must sum to 1: apply softmax to logits")
    theta = theta / total  # which a softmax in bfloat16 misses by its rounding
    index, counts = _index(labels, theta)
    joint = class_sums(theta[None], index, len(counts))[0]
    known = joint.sum(0) > 0
    conditional = joint[:, known] / joint[:, known].sum(0)
    return float((conditional[index] * theta[:, known]).sum(1).log().mean())


def nce(source_labels: Tensor, labels: Tensor) -> float:
    """NCE: minus the conditional entropy of the target labels given a source classifier's labels, -H(Y | Z).

    Args:
        source_labels: [N], integers. labels: [N], integers.

    Returns:
        From -log C to 0.

    Raises:
        DataError: labels that are no class indices, or of different lengths.
    """
    source = check_labels(source_labels, len(labels))
    target = check_labels(labels, len(labels))
    if len(target) == 0:
        raise DataError("there are no labels")
    z, y = (t.unique(return_inverse=True)[1] for t in (source, target))
    joint = torch.zeros(int(z.max()) + 1, int(y.max()) + 1, dtype=torch.float64, device="cpu")
    joint.index_put_((z, y), torch.ones(len(y), dtype=torch.float64, device="cpu"), accumulate=True)
    joint /= len(y)
    given = joint / joint.sum(1, keepdim=True)
    return float(torch.special.xlogy(joint, given).sum())


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred features in float64, class of each image 0 … C-1, images per class."""
    if not is_floating(features, 2) or not features.numel():
        raise DataError(f"features must be floating point [N, h] and not empty, got {kind_of(features)}")
    f = features.detach().double()
    if not bool(f.isfinite().all()):
        raise DataError("features hold NaN or infinity")
    index, counts = _index(labels, f)
    if len(counts) < 2:
        raise DataError("a transferability needs images of at least two classes")
    f = f - f.mean(0)
    if not float(f.abs().max()) > 1e-12 * float(features.abs().max()):
        raise DataError("features are constant: they tell nothing about the labels")
    return f, index, counts


def _index(labels: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    checked = check_labels(labels, len(beside))
    _, index, counts = checked.unique(return_inverse=True, return_counts=True)
    return index.to(beside.device), counts.to(beside)


def _class_means(f: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    return class_sums(f[None], index, len(counts))[0] / counts[:, None]
