"""fitted_head: a linear head in closed form, for a tuning that need not spend its first epochs on finding one."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hgprompt.sample import folds_of
from hgprompt.statistics import EnsembleStatistics
from hgprompt.task_loss import fit_heads, held_out_logits, inverse_temperatures

HeadStart = Literal["random", "fitted"]
HEAD_STARTS: tuple[HeadStart, ...] = ("random", "fitted")
_FOLDS = 8


def fitted_head(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis with priors, its covariance shrunk by Ledoit and Wolf's intensity, at a temperature.

    With fewer images than features, LDA is right far more often than it is calibrated (docs/choices.md): its logits are
    divided by the temperature of the least cross-entropy on held-out images (at most eight folds, with a share of every
    class in each), which is never below 1. How the classes follow one another in the images does not matter.

    Args:
        features: [N, h]. labels: [N], from 0 to C - 1. num_classes: C.

    Returns:
        weight [C, h] and bias [C], float32, on the CPU. A class without images has zero weights, as if its mean were
        that of all, and the prior of half an image.

    Raises:
        DataError: features that are not finite.
    """
    device = torch.device("cpu")
    # Side by side, the images of a class are dealt to all folds.
    order = labels.argsort(stable=True)
    features, labels = features[order.to(features.device)], labels[order]
    folds = max(1, min(_FOLDS, len(labels)))
    crossed, whole = EnsembleStatistics(folds=folds), EnsembleStatistics(folds=1)
    for statistics in (crossed, whole):
        statistics.update(features[None], labels)
    factor = torch.ones(1, dtype=torch.float64, device="cpu")
    if folds > 1:
        fold_of = torch.from_numpy(folds_of(np.arange(len(labels)), folds))
        by_fold = [fold_of == k for k in range(folds)]
        logits, targets = held_out_logits(
            fit_heads("lda", crossed, device=device),
            [features[None, own.to(features.device)].cpu() for own in by_fold],
            [labels[own.to(labels.device)].cpu() for own in by_fold],
        )
        factor = inverse_temperatures(logits, targets).clamp_max(1.0)
    head = fit_heads("lda", whole, device=device)[0].sharpened(factor)
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float32, device="cpu")
    bias = torch.full((num_classes,), float(factor) * math.log(0.5 / len(labels)), dtype=torch.float32, device="cpu")
    weight[head.classes], bias[head.classes] = head.weight[0].float(), head.bias[0].float()
    return weight, bias
