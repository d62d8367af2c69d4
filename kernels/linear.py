"""A product with a frozen weight that ends where it stands: bias and activation, or a multiplication, in its epilogue.

What is then neither written nor read again are the widest tensors of the network. Tiles come and go by the bulk copy
engine (tensor descriptors), which sm_90 has; without it the same code spills and is slow.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels import compiler
from hgprompt.kernels.activation import Activation, activate, slope_of, value_of
from hgprompt.kernels.compiler import cdiv, jit, launch_options, on_device, precision_of, tl

# What plain PyTorch computes ------------------------------------------------------------------------------------------


def linear_activate_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation
) -> tuple[Tensor, Tensor]:
    """The specification of `linear_activate`."""
    with torch.enable_grad():
        pre = F.linear(x.detach(), weight, bias).requires_grad_()
        out = activate(pre, activation)
        (slope,) = torch.autograd.grad(out.sum(), pre)
    return out.detach(), slope


def linear_multiply_reference(dy: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """The specification of `linear_multiply`."""
    return (dy @ weight) * slope


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _finish(
    total, bias, out, slope, m, n, N,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, MULTIPLY: tl.constexpr,
):  # fmt: skip
    """What is done with a tile of the product at (m, n), WIDTH columns wide, before it is written."""
    exact: tl.constexpr = out.dtype == tl.float32
    if BIAS:
        columns = n + tl.arange(0, WIDTH)
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        slope.store([m, n], slope_of(total, ACTIVATION, exact).to(out.dtype))
    if MULTIPLY:
        total *= slope.load([m, n]).to(tl.float32)
    else:
        total = value_of(total, ACTIVATION, exact)
    out.store([m, n], total.to(out.dtype))


@jit
def _linear(
    a,  # descriptor of [M, K], tiles [BLOCK_M, BLOCK_K]
    b,  # descriptor of [N, K], tiles [BLOCK_N, BLOCK_K]; MULTIPLY: of [K, N], tiles [BLOCK_K, BLOCK_N]
    bias,  # [N], where BIAS
    out,  # descriptor of [M, N], tiles [BLOCK_M, BLOCK_N / PARTS]
    slope,  # as out: written where KEEP, multiplied with where MULTIPLY
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KEEP: tl.constexpr, MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = activation(a bᵀ + bias), keeping its derivative; or out = (a b) · slope. Descriptors read 0 beyond the ends
    of their tensors, and write nothing there.

    As many programs as there is room for take tile after tile: the next one's first operands are on their way while
    this one's results leave. PARTS: the results leave in two halves, which need half the registers.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # Programs that run together share rows of a and columns of b: GROUP tiles down before the next column.
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        m = (group * GROUP + (tile % (GROUP * tiles_n)) % height) * BLOCK_M
        n = (tile % (GROUP * tiles_n)) // height * BLOCK_N
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if MULTIPLY:
                total = tl.dot(a.load([m, k]), b.load([k, n]), total, input_precision=PRECISION)
            else:
                total = tl.dot(a.load([m, k]), tl.trans(b.load([n, k])), total, input_precision=PRECISION)
        if PARTS == 2:
            left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            _finish(left, bias, out, slope, m, n, N, BLOCK_N // 2, BIAS, ACTIVATION, KEEP, MULTIPLY)
            _finish(right, bias, out, slope, m, n + BLOCK_N // 2, N, BLOCK_N // 2, BIAS, ACTIVATION, KEEP, MULTIPLY)
        else:
            _finish(total, bias, out, slope, m, n, N, BLOCK_N, BIAS, ACTIVATION, KEEP, MULTIPLY)


# Launchers ------------------------------------------------------------------------------------------------------------


def available(x: Tensor, *widths: int) -> bool:
    """Whether the kernel runs on x's device, on tensors of these last dimensions (rows of 16 bytes)."""
    known = compiler.available(x.device) and "linear" in compiler.configurations()[compiler.architecture(x.device)]
    return known and all(width * x.element_size() % 16 == 0 for width in widths)


def linear_activate(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """activation(x weightᵀ + bias) and, if it is to be kept, the activation's derivative there (Triton).

    Args:
        x: [..., K]; float16, bfloat16 or float32. weight: [N, K]. bias: [N] or None. K and N: `available`.

    Returns:
        [..., N] twice; the derivative is empty without `keep`.
    """
    slope = x.new_empty(*x.shape[:-1], len(weight)) if keep else None
    out = _launch(x, weight, bias, activation, slope, multiply=False)
    return out, x.new_empty(0) if slope is None else slope


def linear_multiply(dy: Tensor, weight: Tensor, slope: Tensor) -> Tensor:
    """(dy weight) · slope (Triton).

    Args:
        dy: [..., K]. weight: [K, N]. slope: [..., N]. As for `linear_activate`.
    """
    return _launch(dy, weight, None, "relu", slope, multiply=True)


def _launch(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: Activation, slope: Tensor | None, *, multiply: bool
) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    inner, columns = a.shape[-1], b.shape[1 if multiply else 0]
    rows = a.numel() // inner
    out = a.new_empty(*a.shape[:-1], columns)
    if not rows:
        return out
    options = launch_options("linear", a, 0)
    m, n, k = (options[f"BLOCK_{name}"] for name in "MNK")
    tile = [m, n // options["PARTS"]]
    slope = out if slope is None else slope.contiguous()
    programs = min(cdiv(rows, m) * cdiv(columns, n), options.pop("PER_SM") * _multiprocessors(a.device))
    with on_device(a):
        _linear[(programs,)](
            _tiles(a, [m, k]), _tiles(b, [k, n] if multiply else [n, k]), b if bias is None else bias,
            _tiles(out, tile), _tiles(slope, tile), rows, columns, inner, BIAS=bias is not None, ACTIVATION=activation,
            KEEP=slope is not out and not multiply, MULTIPLY=multiply, PRECISION=precision_of(a.dtype), **options,
        )  # fmt: skip
    return out


def _tiles(x: Tensor, shape: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), shape)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
