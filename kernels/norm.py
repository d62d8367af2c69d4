"""Normalisation without an affine part: packing folds weight and bias into the linear layer that follows."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

NormKind = Literal["layer", "rms"]


def normalize(
    x: Tensor, kind: NormKind, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """LayerNorm ("layer") or RMSNorm ("rms") over the last dimension.

    Args:
        x: [..., d], floating point.
        kind: which of the two; RMSNorm takes no bias.
        eps: added to the variance, or to the mean square.
        weight: optional scale [d].
        bias: optional shift [d].

    Returns:
        Tensor of x's shape and dtype.
    """
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)
