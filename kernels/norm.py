"""Normalisation without an affine part (packing folds weight and bias into the linear layer that follows), alone or
together with the residual addition before it.

The residual stream is read and written once: x + y and its normalised rows come out of one kernel, and on the way back
the gradient of the sum goes to both. What is kept for the backward pass are the normalised rows, which exist anyway,
and one number per row.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels.compiler import cdiv, jit, launch_options, next_power_of_2, on_device, tl
from hgprompt.kernels.operators import Operator

NormKind = Literal["layer", "rms"]

# What plain PyTorch computes ------------------------------------------------------------------------------------------


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


def add_normalize_reference(
    x: Tensor, y: Tensor | None, kind: NormKind, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The specification of `add_normalize`."""
    total = x if y is None else x + y
    return total, normalize(total, kind, eps).to(dtype)


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _forward(
    x, y,  # [rows, D]: residual stream, and what is added to it
    total,  # [rows, D], as x: their sum, where ADD
    z,  # [rows, D]: normalised rows
    rstd,  # [rows] float32
    rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    place = r[:, None] * D + d[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=inside)
    if CENTRE:
        value = tl.where(inside, value - tl.sum(value, 1)[:, None] / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
    tl.store(z + place, (value * scale[:, None]).to(z.dtype.element_ty), mask=inside)
    tl.store(rstd + r, scale, mask=r < rows)


@jit
def _backward(
    dtotal,  # [rows, D]: gradient of the sum, where ADDED
    dz,  # [rows, D]
    z, rstd,  # as the forward pass left them
    dx,  # [rows, D], dtype of x
    dy,  # [rows, D], dtype of y, where TWO
    rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    ADDED: tl.constexpr, TWO: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    place = r[:, None] * D + d[None, :]
    slope = tl.load(dz + place, mask=inside, other=0.0).to(tl.float32)
    normal = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(slope * normal, 1) / D
    if CENTRE:
        slope -= tl.sum(slope, 1)[:, None] / D
    value = (slope - normal * along[:, None]) * tl.load(rstd + r, mask=r < rows, other=0.0)[:, None]
    if ADDED:
        value += tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + place, value.to(dx.dtype.element_ty), mask=inside)
    if TWO:
        tl.store(dy + place, value.to(dy.dtype.element_ty), mask=inside)


# Operators ------------------------------------------------------------------------------------------------------------


def _launch(x, y, centre, eps, dtype):
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total, z, rstd = _outputs(x, y, dtype)
    rows, width = rstd.numel(), x.shape[-1]
    options = launch_options("normalize", x, next_power_of_2(width))
    if rows:
        with on_device(x):
            _forward[(cdiv(rows, options["BLOCK"]),)](
                x, x if y is None else y, total, z, rstd, rows, eps,
                D=width, BLOCK_D=next_power_of_2(width), ADD=y is not None, CENTRE=centre, **options,
            )  # fmt: skip
    return total, z, rstd


def _outputs(x, y, dtype):
    """total (empty where nothing is added), z, rstd."""
    total = x.new_empty(0 if y is None else x.shape)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _launch_backward(dtotal, dz, z, rstd, centre, x_dtype, y_dtype):
    dz, dtotal = dz.contiguous(), None if dtotal is None else dtotal.contiguous()
    dx, dy = _gradients(z, x_dtype, y_dtype)
    rows, width = rstd.numel(), z.shape[-1]
    options = launch_options("normalize_backward", dx, next_power_of_2(width))
    if rows:
        with on_device(z):
            _backward[(cdiv(rows, options["BLOCK"]),)](
                dz if dtotal is None else dtotal, dz, z, rstd, dx, dy, rows,
                D=width, BLOCK_D=next_power_of_2(width), ADDED=dtotal is not None, TWO=dy.numel() > 0, CENTRE=centre,
                **options,
            )  # fmt: skip
    return dx, dy


def _gradients(z, x_dtype, y_dtype):
    """dx and dy; the latter empty where there is no y, or where it is dx in y's dtype too."""
    two = y_dtype is not None and y_dtype != x_dtype
    return z.new_empty(z.shape, dtype=x_dtype), z.new_empty(z.shape if two else 0, dtype=y_dtype or x_dtype)


def _setup(ctx, inputs, output):
    x, y, ctx.centre, _, _ = inputs
    ctx.x_dtype, ctx.y_dtype = x.dtype, None if y is None else y.dtype
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dtotal, dz, _):
    if ctx.y_dtype is None:
        dtotal = None  # the sum is then no output
    z, rstd = ctx.saved_tensors
    if dz is None:
        dx = dtotal
        dy = None if dtotal is None or ctx.y_dtype is None else dtotal.to(ctx.y_dtype)
        return dx, dy, None, None, None
    dx, dy = _backward_op(dtotal, dz, z, rstd, ctx.centre, ctx.x_dtype, ctx.y_dtype)
    if ctx.y_dtype is None:
        return dx, None, None, None, None
    return dx, dy if ctx.y_dtype != ctx.x_dtype else dx, None, None, None


_op = Operator(
    "add_normalize", "(Tensor x, Tensor? y, bool centre, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _launch, lambda x, y, centre, eps, dtype: _outputs(x, y, dtype), backward=_autograd, setup=_setup,
)  # fmt: skip
_backward_op = Operator(
    "add_normalize_backward",
    "(Tensor? dtotal, Tensor dz, Tensor z, Tensor rstd, bool centre, ScalarType x_dtype, ScalarType? y_dtype)"
    " -> (Tensor, Tensor)",
    _launch_backward, lambda dtotal, dz, z, rstd, centre, x_dtype, y_dtype: _gradients(z, x_dtype, y_dtype),
)  # fmt: skip


def add_normalize(x: Tensor, y: Tensor | None, kind: NormKind, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x + y and its normalised rows (Triton).

    Args:
        x: residual stream [..., d]. y: what is added to it [..., d], of its own dtype, or None.
        kind, eps: as for `normalize`. dtype: of the normalised rows.

    Returns:
        The sum, in x's dtype (x itself without y), and the normalised rows. Differentiable once.
    """
    total, z, _ = _op(x, y, kind == "layer", eps, dtype)
    return (x if y is None else total), z
