"""Normalisation without an affine part (packing folds weight and bias into the linear layer that follows), alone or
together with the residual addition before it.

The residual stream is read and written once: x + y and its normalised rows come out of one kernel, and on the way back
the gradient of the sum goes to both. What is kept for the backward pass are the normalised rows, which exist anyway,
and one number per row.

Below float32 the stream would lose a bit of every block's work to rounding. In float16 it is float32; in bfloat16 it is
two tensors whose sum has 16 bits of mantissa, in the same traffic. Its gradient then belongs to the first of them and
has the dtype of everything else on the way back: x and y share one tensor, and nothing is written twice.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

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


class Stream(NamedTuple):
    """The residual stream [..., T, d]: a tensor of float32 or float64; or of 16 bits, with what rounding to them took
    away in a second tensor, which carries no gradient (None: nothing was taken away)."""

    high: Tensor
    low: Tensor | None = None

    def first(self, rows: int) -> Stream:
        """Its first rows along T."""
        return Stream(self.high[..., :rows, :], None if self.low is None else self.low[..., :rows, :])

    def value(self) -> Tensor:
        """What it stands for, in float32 or float64."""
        wide = torch.promote_types(self.high.dtype, torch.float32)
        return self.high.to(wide) if self.low is None else self.high.to(wide) + self.low.to(wide)


def residual_reference(x: Tensor) -> Tensor:
    """What a stream begins with: x in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def residual(x: Tensor) -> Tensor:
    """What a stream begins with for the kernels: bfloat16 stays, to be the first of two tensors. float16 does not,
    since gradients that a stream of many blocks adds up may fall out of its range."""
    return x if x.dtype == torch.bfloat16 else residual_reference(x)


def add_normalize_reference(
    x: Stream, y: Tensor | None, kind: NormKind, eps: float, dtype: torch.dtype
) -> tuple[Stream, Tensor]:
    """The specification of `add_normalize`."""
    total = x.value() if y is None else x.value() + y
    z = normalize(total, kind, eps).to(dtype)
    if y is None:
        return x, z
    high = total.to(x.high.dtype)
    return Stream(high, (total - high).detach().to(high.dtype) if high.dtype.itemsize == 2 else None), z


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _forward(
    x, low,  # [rows, D]: residual stream; low where LOW
    y,  # [rows, D]: what is added to it, where ADD
    total, total_low,  # [rows, D], as x: their sum, where ADD; total_low where x has 16 bits
    z,  # [rows, D]: normalised rows
    rstd,  # [rows] float32
    rows, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    LOW: tl.constexpr, ADD: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (r < rows)[:, None] & (d < D)[None, :]
    place = r[:, None] * D + d[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if LOW:
        value += tl.load(low + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
        high = value.to(total.dtype.element_ty)
        tl.store(total + place, high, mask=inside)
        if total.dtype.element_ty != tl.float32:
            tl.store(total_low + place, (value - high.to(tl.float32)).to(total_low.dtype.element_ty), mask=inside)
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


def _launch(x, low, y, centre, eps, dtype):
    x, low, y = (t if t is None else t.contiguous() for t in (x, low, y))
    total, total_low, z, rstd = _outputs(x, y, dtype)
    rows, width = rstd.numel(), x.shape[-1]
    options = launch_options("normalize", x, next_power_of_2(width))
    if rows:
        with on_device(x):
            _forward[(cdiv(rows, options["BLOCK"]),)](
                x, x if low is None else low, x if y is None else y, total, total_low, z, rstd, rows, eps,
                D=width, BLOCK_D=next_power_of_2(width), LOW=low is not None, ADD=y is not None, CENTRE=centre,
                **options,
            )  # fmt: skip
    return total, total_low, z, rstd


def _outputs(x, y, dtype):
    """total and its second tensor (empty where nothing is added, or where there is none), z, rstd."""
    total = x.new_empty(0 if y is None else x.shape)
    total_low = x.new_empty(total.shape if x.element_size() == 2 else 0)
    return total, total_low, x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


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
    x, _, y, ctx.centre, _, _ = inputs
    ctx.x_dtype, ctx.y_dtype = x.dtype, None if y is None else y.dtype
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dtotal, _, dz, __):
    if ctx.y_dtype is None:
        dtotal = None  # the sum is then no output
    z, rstd = ctx.saved_tensors
    if dz is None:
        dx = dtotal
        dy = None if dtotal is None or ctx.y_dtype is None else dtotal.to(ctx.y_dtype)
    else:
        dx, dy = _backward_op(dtotal, dz, z, rstd, ctx.centre, ctx.x_dtype, ctx.y_dtype)
        if ctx.y_dtype is None or ctx.y_dtype == ctx.x_dtype:
            dy = None if ctx.y_dtype is None else dx
    return dx, None, dy, None, None, None


_op = Operator(
    "add_normalize",
    "(Tensor x, Tensor? low, Tensor? y, bool centre, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch, lambda x, low, y, centre, eps, dtype: _outputs(x, y, dtype), backward=_autograd, setup=_setup,
)  # fmt: skip
_backward_op = Operator(
    "add_normalize_backward",
    "(Tensor? dtotal, Tensor dz, Tensor z, Tensor rstd, bool centre, ScalarType x_dtype, ScalarType? y_dtype)"
    " -> (Tensor, Tensor)",
    _launch_backward, lambda dtotal, dz, z, rstd, centre, x_dtype, y_dtype: _gradients(z, x_dtype, y_dtype),
)  # fmt: skip


def add_normalize(x: Stream, y: Tensor | None, kind: NormKind, eps: float, dtype: torch.dtype) -> tuple[Stream, Tensor]:
    """x + y and its normalised rows (Triton).

    Args:
        x: residual stream [..., d]. y: what is added to it [..., d], of its own dtype, or None.
        kind, eps: as for `normalize`. dtype: of the normalised rows.

    Returns:
        The sum, a stream as x is (of 16 bits: two tensors; x itself without y), and the normalised rows of what it was
        before it was rounded. Differentiable once.
    """
    total, low, z, _ = _op(x.high, x.low, y, kind == "layer", eps, dtype)
    return x if y is None else Stream(total, low if low.numel() else None), z
