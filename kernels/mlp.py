"""The MLP of a transformer block: linear, activation (gated or not), linear."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Elementwise activation; "gelu" is the exact one, "gelu_tanh" its tanh approximation."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    return F.relu(x)


def hidden(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, gated: bool) -> Tensor:
    """First half of the MLP.

    Args:
        x: [..., d].
        weight: [f, d]; gated: [2f, d], the rows of the gate before those of the value.
        bias: [f] or [2f], or None.
        activation: applied to the whole, or to the gate alone.
        gated: activation(gate) · value, as in SwiGLU.

    Returns:
        [..., f], dtype of x.
    """
    y = F.linear(x, weight, bias)
    if not gated:
        return activate(y, activation)
    gate, value = y.chunk(2, dim=-1)
    return activate(gate, activation) * value
