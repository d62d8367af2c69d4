"""Activations of an MLP, gated or not, and their derivatives: one pass over the network's widest tensors."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels.compiler import cdiv, jit, launch_options, on_device, tl

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]

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
def value_of(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
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
def slope_of(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
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
    y = value_of(tl.load(pre + place, mask=inside, other=0.0).to(tl.float32), ACTIVATION, exact)
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
        tl.store(dpre + place + F, (d * value_of(x, ACTIVATION, exact)).to(dpre.dtype.element_ty), mask=inside)
        d *= value
    tl.store(dpre + place, (d * slope_of(x, ACTIVATION, exact)).to(dpre.dtype.element_ty), mask=inside)


# Launcher -------------------------------------------------------------------------------------------------------------


def launch_activate(pre: Tensor, out: Tensor, activation: Activation, gated: bool, dout: Tensor | None = None) -> None:
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
