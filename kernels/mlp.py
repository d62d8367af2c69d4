"""The MLP of a transformer block: linear, activation (gated or not), linear.

Two forms of one operator. "library": the library's products with the activation as a kernel between them. "fused": our
product, whose epilogue adds the bias and activates, and on the way back multiplies with the activation's derivative
(`hgprompt.kernels.linear`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels import linear
from hgprompt.kernels.activation import Activation, activate, launch_activate
from hgprompt.kernels.operators import Operator

Form = Literal["library", "fused"]

# What plain PyTorch computes ------------------------------------------------------------------------------------------


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


def mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: Activation,
    gated: bool,
) -> Tensor:  # fmt: skip
    """The specification of `mlp`."""
    return F.linear(hidden(x, weight1, bias1, activation, gated), weight2, bias2)


# Operators ------------------------------------------------------------------------------------------------------------


def _launch(x, weight1, bias1, weight2, bias2, activation, gated, fused, keep):
    if fused:
        middle, kept = linear.linear_activate(x, weight1, bias1, activation, keep=keep)
    else:
        kept = F.linear(x, weight1, bias1)
        middle = kept.new_empty(*x.shape[:-1], weight2.shape[1])
        launch_activate(kept, middle, activation, gated)
        if not keep:
            kept = kept.new_empty(0)
    return F.linear(middle, weight2, bias2), kept


def _kept(x, weight1, weight2, fused, keep):
    """What the backward pass needs: the derivative (fused), or what was activated."""
    if not keep:
        return x.new_empty(0)
    return x.new_empty(*x.shape[:-1], weight2.shape[1] if fused else weight1.shape[0])


def _fake(x, weight1, bias1, weight2, bias2, activation, gated, fused, keep):
    return x.new_empty(*x.shape[:-1], weight2.shape[0]), _kept(x, weight1, weight2, fused, keep)


def _launch_backward(dy, kept, weight1, weight2, activation, gated, fused):
    if fused:
        dpre = linear.linear_multiply(dy, weight2, kept)
    else:
        dpre = torch.empty_like(kept)
        launch_activate(kept, dpre, activation, gated, dout=torch.matmul(dy, weight2).contiguous())
    return torch.matmul(dpre, weight1)


def _fake_backward(dy, kept, weight1, weight2, activation, gated, fused):
    return dy.new_empty(*dy.shape[:-1], weight1.shape[1])


def _setup(ctx, inputs, output):
    _, weight1, _, weight2, _, ctx.activation, ctx.gated, ctx.fused, _ = inputs
    ctx.save_for_backward(output[1], weight1, weight2)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else zeros as large as what is kept would be written for it


def _autograd(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    kept, weight1, weight2 = ctx.saved_tensors
    dx = _backward_op(dy, kept, weight1, weight2, ctx.activation, ctx.gated, ctx.fused)
    return (dx, *[None] * 8)


_op = Operator(
    "mlp",
    "(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, str activation, bool gated, "
    "bool fused, bool keep) -> (Tensor, Tensor)",
    _launch, _fake, backward=_autograd, setup=_setup,
)  # fmt: skip
_backward_op = Operator(
    "mlp_backward",
    "(Tensor dy, Tensor kept, Tensor weight1, Tensor weight2, str activation, bool gated, bool fused) -> Tensor",
    _launch_backward, _fake_backward,
)  # fmt: skip


def mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: Activation,
    gated: bool = False, form: Form = "library",
) -> Tensor:  # fmt: skip
    """The MLP of a block with frozen weights (Triton); see `mlp_reference`.

    Args:
        x: [..., d]; float16, bfloat16 or float32. weight1, bias1: as for `hidden`. weight2: [e, f]. bias2: [e] or None.
        activation, gated: as for `hidden`.
        form: "library", or "fused" where it can be: an MLP that is not gated, widths in rows of 16 bytes, from sm_90.

    Returns:
        [..., e]. Differentiable once, in x alone.
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    fused = form == "fused" and not gated and linear.available(x, *weight1.shape, *weight2.shape)
    out: Tensor = _op(x, weight1, bias1, weight2, bias2, activation, gated, fused, keep)[0]
    return out
