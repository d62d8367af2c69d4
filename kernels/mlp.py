"""The MLP of a transformer block: linear, activation (gated or not), linear.

Two forms of one operator. "library": the library's products with the activation as a kernel between them. "fused": our
product, whose epilogue adds the bias and activates, and on the way back multiplies with the activation's derivative:
the widest tensors of the network are then read and written less often.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels.compiler import cdiv, jit, launch_options, on_device, precision_of, tl
from hgprompt.kernels.operators import Operator

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
Form = Literal["library", "fused"]

# What plain PyTorch computes ------------------------------------------------------------------------------------------


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


def mlp_reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: Activation,
    gated: bool,
) -> Tensor:  # fmt: skip
    """The specification of `mlp`."""
    return F.linear(hidden(x, weight1, bias1, activation, gated), weight2, bias2)


# Kernels --------------------------------------------------------------------------------------------------------------


# Where numbers are rounded to 16 bits anyway, the float32 arithmetic between need not be exact to the last bit: a
# division is the square of the hardware's rsqrt (2 instructions for 9), and the normal distribution six multiply-adds
# (16 instructions for erf's 34). In float32 (EXACT) nothing is approximated.


@jit
def _reciprocal(x, EXACT: tl.constexpr):
    """1 / x of x > 0."""
    if EXACT:
        return 1.0 / x
    root = tl.rsqrt(x)
    return root * root


@jit
def _sigmoid(x, EXACT: tl.constexpr):
    return _reciprocal(1.0 + tl.exp2(-1.4426950408889634 * x), EXACT)


@jit
def _normal(x, EXACT: tl.constexpr):
    """Φ(x) and exp(-x² / 2) of the standard normal distribution.

    Not EXACT: the smaller of Φ(x) and 1 - Φ(x) is exp(-x² / 2) · t P(t), t = 1 / (1 + 0.38 |x|), with our own minimax
    fit of P to a relative error of 3.6e-5 (Abramowitz and Stegun 7.1.26 have this form, for an absolute error): at
    most a seventh of half a unit in the last place of float16, at any x.
    """
    gauss = tl.exp2(-0.7213475204444817 * x * x)
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)), gauss
    t = _reciprocal(1.0 + 0.38 * tl.abs(x), EXACT)
    p = 0.15122504 + t * (0.15783038 + t * (0.09197687 + t * (0.18888008 - t * 0.08992989)))
    tail = gauss * t * p
    return tl.where(x < 0.0, tail, 1.0 - tail), gauss


@jit
def _value(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of float32 numbers."""
    if ACTIVATION == "gelu":
        share, _ = _normal(x, EXACT)
        return x * share
    if ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2u)
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
    if ACTIVATION == "silu":
        return x * _sigmoid(x, EXACT)
    return tl.maximum(x, 0.0)


@jit
def _slope(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """Its derivative."""
    if ACTIVATION == "gelu":
        share, gauss = _normal(x, EXACT)
        return share + 0.3989422804014327 * x * gauss
    if ACTIVATION == "gelu_tanh":
        s = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    if ACTIVATION == "silu":
        s = _sigmoid(x, EXACT)
        return s + x * s * (1.0 - s)
    return tl.where(x > 0.0, 1.0, 0.0)


@jit
def _activate(
    pre,  # [rows, F], GATED: [rows, 2F], gate before value
    out,  # [rows, F]
    count,  # rows · F
    F: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = (i // F) * (2 * F) + i % F if GATED else i
    exact: tl.constexpr = out.dtype.element_ty == tl.float32
    y = _value(tl.load(pre + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION, exact)
    if GATED:
        y *= tl.load(pre + place + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=inside)


@jit
def _activate_backward(
    dout,  # [rows, F]
    pre, dpre,  # [rows, F], GATED: [rows, 2F]
    count, F: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    place = (i // F) * (2 * F) + i % F if GATED else i
    exact: tl.constexpr = dpre.dtype.element_ty == tl.float32
    d = tl.load(dout + i, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(pre + place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value = tl.load(pre + place + F, mask=inside, other=0.0).to(tl.float32)
        tl.store(dpre + place + F, (d * _value(x, ACTIVATION, exact)).to(dpre.dtype.element_ty), mask=inside)
        d *= value
    tl.store(dpre + place, (d * _slope(x, ACTIVATION, exact)).to(dpre.dtype.element_ty), mask=inside)


@jit
def _linear(
    a,  # [M, K]
    b,  # element (k, n) at k · b_k + n · b_n
    bias,  # [N], where BIAS
    out,  # [M, N]
    slope,  # [M, N]: written where KEEP, multiplied with where MULTIPLY
    M, N, K, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = activation(a b + bias), keeping its derivative; or out = (a b) · slope."""
    # Programs that run together share rows of a and columns of b: GROUP tiles down before the next column.
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (pid % (GROUP * tiles_n)) % height
    tile_n = (pid % (GROUP * tiles_n)) // height
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_tile = a + m[:, None] * K + k[None, :]
    b_tile = b + k[:, None] * b_k + n[None, :] * b_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        left = k < K - start
        x = tl.load(a_tile, mask=(m < M)[:, None] & left[None, :], other=0.0)
        y = tl.load(b_tile, mask=left[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        b_tile += BLOCK_K * b_k
    exact: tl.constexpr = out.dtype.element_ty == tl.float32
    place = m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(slope + place, _slope(total, ACTIVATION, exact).to(slope.dtype.element_ty), mask=inside)
    if MULTIPLY:
        total *= tl.load(slope + place, mask=inside, other=0.0).to(tl.float32)
    else:
        total = _value(total, ACTIVATION, exact)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


# Launchers ------------------------------------------------------------------------------------------------------------


def _launch_activate(pre: Tensor, out: Tensor, activation: Activation, gated: bool, dout: Tensor | None = None) -> None:
    """out = activation(pre), or with dout: out = the gradient of pre."""
    small = out if dout is None else dout
    count, width = small.numel(), small.shape[-1]
    if not count:
        return
    options = launch_options("activate", pre, 0)
    fixed = {"F": width, "GATED": gated, "ACTIVATION": activation} | options
    with on_device(pre):
        if dout is None:
            _activate[(cdiv(count, options["BLOCK"]),)](pre, out, count, **fixed)
        else:
            _activate_backward[(cdiv(count, options["BLOCK"]),)](dout, pre, out, count, **fixed)


def _launch_linear(
    a: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None, activation: Activation,
    slope: Tensor | None, multiply: bool,
) -> Tensor:  # fmt: skip
    """activation(a wᵀ + bias), filling slope, or (a w) · slope. weight [N, K], or transposed [K, N]."""
    a = a.contiguous()
    rows, inner = a.numel() // a.shape[-1], a.shape[-1]
    columns = weight.shape[1] if transposed else weight.shape[0]
    out = a.new_empty(*a.shape[:-1], columns)
    if not rows:
        return out
    options = launch_options("linear", a, 0)
    b_k, b_n = weight.stride() if transposed else weight.stride()[::-1]
    with on_device(a):
        _linear[(cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"]),)](
            a, weight, weight if bias is None else bias, out, out if slope is None else slope,
            rows, columns, inner, b_k, b_n, BIAS=bias is not None, ACTIVATION=activation,
            KEEP=slope is not None and not multiply, MULTIPLY=multiply, PRECISION=precision_of(a.dtype), **options,
        )  # fmt: skip
    return out


# Operators ------------------------------------------------------------------------------------------------------------


def _launch(x, weight1, bias1, weight2, bias2, activation, gated, fused, keep):
    if fused:
        kept = _kept(x, weight1, weight2, fused, keep)
        middle = _launch_linear(x, weight1, False, bias1, activation, kept if keep else None, False)
    else:
        kept = F.linear(x, weight1, bias1)
        middle = kept.new_empty(*x.shape[:-1], weight2.shape[1])
        _launch_activate(kept, middle, activation, gated)
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
        dpre = _launch_linear(dy, weight2, True, None, activation, kept, True)
    else:
        dpre = torch.empty_like(kept)
        _launch_activate(kept, dpre, activation, gated, dout=torch.matmul(dy, weight2).contiguous())
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
        form: "library" or "fused" (of an MLP that is not gated).

    Returns:
        [..., e]. Differentiable once, in x alone.
    """
    keep = torch.is_grad_enabled() and x.requires_grad
    out: Tensor = _op(x, weight1, bias1, weight2, bias2, activation, gated, form == "fused" and not gated, keep)[0]
    return out
