"""The task loss of Eq. 8: which head turns features into the loss that is pulled back to the prompts.

The paper leaves the head open. The default is one linear discriminant analysis for all prompts, fitted in closed form
on the uniform mixture of their features: nothing is trained, and no order of the images matters. It asks the same of
every prompt, to fit one head, as the mixed prompt will have one head to fit. With a head of its own, a prompt sits near
that head's optimum already, and what is left of its gradient is the sampling of the images: on real tasks, gradients of
two halves of the data then have a cosine of about 0, against about 0.8 with the shared head (docs/choices.md).

An image is never scored by a head that has seen it: heads are cross-fitted over the folds. Where images are few beside
features, LDA is right far more often than it is calibrated, and a handful of images would own the gradient: a
temperature per prompt, fitted on the held-out images, mends that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hgprompt.arguments import is_floating, kind_of
from hgprompt.errors import DataError, OptionError
from hgprompt.kernels.compiler import copied
from hgprompt.mixture import solve_regularized
from hgprompt.moments import Moments, merged
from hgprompt.objective import resolve_intensity
from hgprompt.statistics import EnsembleStatistics

# features [b, h] -> logits [b, C], differentiable
HeadFunction = Callable[[Tensor], Tensor]
FittedHead = Literal["shared-lda", "lda", "centroid"]
Head = FittedHead | nn.Module | HeadFunction | Sequence[nn.Module | HeadFunction]
FITTED: tuple[FittedHead, ...] = ("shared-lda", "lda", "centroid")


@dataclass(frozen=True)
class LinearHeads:
    """One linear head per prompt, in closed form.

    Attributes:
        weight: [M, C, h]. bias: [M, C]. classes: labels of the C outputs, ascending [C].
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor

    def loss(self, features: Tensor, labels: Tensor, prompts: slice) -> Tensor:
        """Summed cross-entropy [m] of features [m, b, h] under the heads of those prompts.

        An image of a class that no other fold has seen has no output to be scored by, and counts nothing.
        """
        logits = self.logits(features, prompts)
        target = copied(self.targets(labels), features.device)
        losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(len(features)), reduction="none")
        return losses.unflatten(0, features.shape[:2]).sum(1)

    def logits(self, features: Tensor, prompts: slice) -> Tensor:
        """features [m, b, h] of those prompts → [m, b, C]."""
        logits = torch.einsum("mbh,mch->mbc", features.to(self.weight), self.weight[prompts])
        return logits + self.bias[prompts, None]

    def targets(self, labels: Tensor) -> Tensor:
        """Places of labels [b] among the outputs, -100 (cross_entropy's ignore_index) where there is none."""
        index = torch.searchsorted(self.classes, labels).clamp_max(len(self.classes) - 1)
        return torch.where(self.classes[index] == labels, index, -100)

    def sharpened(self, factor: Tensor) -> LinearHeads:
        """Logits times a factor [M]."""
        factor = factor.to(self.weight)
        return LinearHeads(self.weight * factor[:, None, None], self.bias * factor[:, None], self.classes)


def fit_heads(kind: FittedHead, statistics: EnsembleStatistics, *, device: torch.device) -> list[LinearHeads]:
    """Heads for every fold, fitted on the images of all other folds (with one fold: on all).

    Args:
        kind: "lda": per prompt, shrunk within-class covariance; "shared-lda": one such head for all prompts, on the
            uniform mixture of their features; "centroid": per prompt, LDA with a multiple of the identity.
        statistics: of the whole pass.
        device: where the heads will be used.

    Returns:
        `folds` LinearHeads in float32 (float64 where the features are).
    """
    m = statistics.num_prompts
    uniform = statistics.mixture_moments()
    intensity = lda_intensity(uniform)
    left_out = range(statistics.folds) if statistics.folds > 1 else [None]
    heads: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    if kind == "shared-lda":
        heads = [[_lda(merged(uniform, k), intensity)] * m for k in left_out]
    else:
        heads = [[] for _ in range(statistics.folds)]
        for i in range(m):
            by_fold = statistics.prompt_moments(i)
            for fold, k in zip(heads, left_out, strict=True):
                fold.append(_lda(merged(by_fold, k), 1.0 if kind == "centroid" else intensity))
    dtype = torch.float64 if statistics.dtype == torch.float64 else torch.float32
    return [
        LinearHeads(
            torch.stack([w for w, _, _ in fold]).to(device, dtype),
            torch.stack([b for _, b, _ in fold]).to(device, dtype),
            fold[0][2],
        )
        for fold in heads
    ]


def inverse_temperatures(logits: Tensor, targets: Tensor) -> Tensor:
    """The factors t [M] that minimise the cross-entropy of t · logits (Guo et al. 2017, "On calibration of modern
    neural networks"), between 1e-4 and 100; 1 where no target is known.

    Args:
        logits: [M, n, C] of images that the heads have not seen; -inf marks a class that a head does not know.
        targets: [n], -100 where unknown.
    """
    logits, targets = logits[:, targets >= 0].double(), targets[targets >= 0].to(logits.device)
    if len(targets) == 0:
        return torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    finite = torch.where(logits.isfinite(), logits, torch.zeros_like(logits))
    right = finite.gather(2, targets.expand(len(logits), -1)[..., None]).squeeze(2).mean(1)
    # Cross-entropy is convex in t: its slope has one root.
    return _bisected(lambda t: ((t[:, None, None] * logits).softmax(2) * finite).sum(2).mean(1) < right, 1e-4, right)


def surest_temperatures(logits: Tensor, targets: Tensor) -> Tensor:
    """The largest factors t [M] whose t · logits are no surer of themselves than n images can make them; up to 100.

    Where every image is classified rightly, the cross-entropy has no least t, and at a large one a loss without a
    gradient: on easy tasks, for the best prompts. After n right answers in a row the next is right with probability
    (n + 1)/(n + 2), says Laplace's rule of succession: so large is the mean probability of the class decided for at
    most. Arguments as for `inverse_temperatures`.
    """
    logits = logits[:, targets >= 0].double()
    n, like = logits.shape[1], torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    if n == 0:
        return like
    # The largest probability of each image grows with t.
    return _bisected(lambda t: (t[:, None, None] * logits).softmax(2).amax(2).mean(1) < (n + 1) / (n + 2), 1e-12, like)


def _bisected(below: Callable[[Tensor], Tensor], low: float, like: Tensor) -> Tensor:
    """t as `like`, up to which `below` is true, from `low` to 100; in the logarithm, to the last bit that matters."""
    left, right = (torch.full_like(like, math.log(end)) for end in (low, 1e2))
    for _ in range(60):
        middle = (left + right) / 2
        is_below = below(middle.exp())
        left, right = torch.where(is_below, middle, left), torch.where(is_below, right, middle)
    return ((left + right) / 2).exp()


def held_out_logits(
    heads: Sequence[LinearHeads], features: Sequence[Tensor], labels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits [M, n, C] of all folds' images over the classes of any fold, float64 where the heads are, and targets [n].

    Args:
        heads: of every fold.
        features: [M, n_k, h] of images of fold k, which head k has not seen. labels: [n_k].
    """
    classes, device = torch.cat([head.classes for head in heads]).unique(), heads[0].weight.device
    parts, targets = [], []
    for head, f, y in zip(heads, features, labels, strict=True):
        if len(y) == 0:
            continue
        logits = torch.full((len(f), len(y), len(classes)), -torch.inf, dtype=torch.float64, device=device)
        places = torch.searchsorted(classes, head.classes)
        logits[:, :, copied(places, device)] = head.logits(f, slice(None)).double()
        target = head.targets(y)
        parts.append(logits)
        targets.append(torch.where(target >= 0, places[target.clamp_min(0)], -100))
    if not parts:
        none = torch.zeros(len(heads[0].weight), 0, len(classes), dtype=torch.float64, device=device)
        return none, torch.zeros(0, dtype=torch.int64, device="cpu")
    return torch.cat(parts, dim=1), torch.cat(targets)


def lda_intensity(uniform: Sequence[Moments]) -> float:
    """Ledoit–Wolf intensity of the uniform mixture, from its moments fold by fold: one for all prompts, whatever the
    H-score is shrunk with."""
    moments = merged(uniform)
    mean = moments.sums[0] / moments.count
    covariance = moments.mixed_second() / moments.count - torch.outer(mean, mean)
    return resolve_intensity("ledoit-wolf", moments.count, covariance, moments.shifted_fourth(-mean)[1])


def given_loss(head: Head, num_prompts: int) -> Callable[[Tensor, Tensor, slice], Tensor]:
    """Loss of heads that the caller gives: (features [m, b, h], labels [b], prompt indices) → [m], summed over images.

    Raises:
        OptionError: neither a callable nor M of them, or a module in training mode that matters. DataError: while
            running, a head that does not fit the features, or logits that do not fit the labels.
    """
    heads: Sequence[HeadFunction]
    if isinstance(head, (Sequence, nn.ModuleList)) and not isinstance(head, str) and len(head) == num_prompts:
        heads = list(head)
    elif callable(head) and not isinstance(head, nn.ModuleList):
        heads = [head] * num_prompts
    else:
        raise OptionError(
            f"head must be one of {', '.join(map(repr, FITTED))}, a callable features [b, h] → logits [b, C], "
            f"or {num_prompts} of these (one per prompt); got {head!r:.80}"
        )
    for one in heads:
        for part in one.modules() if isinstance(one, nn.Module) else ():
            if part.training and isinstance(part, (_BatchNorm, _DropoutNd)):
                raise OptionError(
                    f"the head is in training mode and holds {type(part).__name__}, which would change or draw at "
                    "random: call head.eval() first"
                )

    def loss(features: Tensor, labels: Tensor, prompts: slice) -> Tensor:
        largest, labels = int(labels.max()) if len(labels) else -1, copied(labels, features.device)
        total = []
        for one, x in zip(heads[prompts], features, strict=True):
            try:
                logits = one(x)
            except torch.OutOfMemoryError:  # the encoder goes on with fewer images
                raise
            except RuntimeError as error:
                if not isinstance(one, nn.Module):  # a function's errors are its author's
                    raise
                raise DataError(f"the head failed on features {kind_of(x)}: {error}") from error
            if not is_floating(logits, 2) or len(logits) != len(labels) or largest >= logits.shape[1]:
                raise DataError(
                    f"the head gives logits {kind_of(logits)} for {len(labels)} images with labels up to "
                    f"{largest}; it must give [b, C] with C above every label"
                )
            total.append(
                F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, reduction="sum")
            )
        return torch.stack(total)

    return loss


def _lda(moments: Moments, intensity: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [C, h], bias [C], classes [C] of LDA with priors, from the moments of one prompt's features."""
    assert moments.centre is not None
    n, h = moments.count, moments.width
    classes = sorted(moments.class_sums)
    counts = torch.tensor([moments.class_counts[c] for c in classes], dtype=torch.float64, device=moments.sums.device)
    mean = moments.sums[0] / n
    means = torch.stack([moments.class_sums[c][0] for c in classes]) / counts[:, None] - mean
    priors = counts / n
    total = moments.quadratic(torch.ones(1, dtype=torch.float64, device="cpu")) / n - torch.outer(mean, mean)
    within = total - (means.T * priors) @ means
    ridge = intensity * within.trace() / h
    weight = solve_regularized((1 - intensity) * within, ridge, means.T, n).T
    bias = priors.log() - 0.5 * (means * weight).sum(1) - weight @ (moments.centre[0] + mean)
    return weight, bias, torch.tensor(classes, device="cpu")
