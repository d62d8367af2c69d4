"""Cosines between the gradients of M prompts, from one reading of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hgprompt.kernels.compiler import cdiv, jit, launch_options, next_power_of_2, on_device, precision_of, takes, tl

_PROGRAMS = 512  # a few for every multiprocessor; a constant, so that all devices add in the same order

# What plain PyTorch computes ------------------------------------------------------------------------------------------


def gram_reference(gradients: Tensor) -> Tensor:
    """The specification of `gram`."""
    g = of_unit_size(gradients.double().flatten(1))
    norms = g.norm(dim=1, keepdim=True)
    g = torch.where(norms == 0, torch.zeros_like(g), g / norms.clamp_min(1e-300))  # NaN stays what it is
    products = g @ g.T
    return (products + products.T) / 2


def of_unit_size(rows: Tensor) -> Tensor:
    """Rows [M, D] divided by their largest elements, whose squares would leave float64's range or lose their digits at
    its end; rows of zeros as they are."""
    if not rows.numel():
        return rows
    largest = rows.detach().abs().amax(1, keepdim=True)
    return rows / torch.where(largest == 0, torch.ones_like(largest), largest)


def grams_reference(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `grams`."""
    whole = parts.sum(0)
    return gram_reference(whole), torch.stack([gram_reference(whole - part) for part in parts])


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _tile(whole, parts, fold, m, d, M, D, p_k, PARTS: tl.constexpr):
    """Rows m, columns d of the gradients; where PARTS, from fold 0 on, of those without the fold."""
    inside = (m < M)[:, None] & (d < D)[None, :]
    place = m[:, None] * D + d[None, :]
    x = tl.load(whole + place, mask=inside, other=0.0)
    if PARTS:
        x -= tl.load(parts + tl.maximum(fold, 0).to(tl.int64) * p_k + place, mask=inside & (fold >= 0), other=0.0)
    return x


@jit
def _scale(x):
    """Per row, the power of two that brings its largest element to about 1, and its inverse: the products of tiny
    gradients, and TF32's remainders of them, stay within float32's range."""
    largest = tl.minimum(tl.maximum(tl.max(tl.abs(x), 1), 2.0**-100), 2.0**100)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return (0x7F000000 - exponent).to(tl.float32, bitcast=True), exponent.to(tl.float32, bitcast=True)


@jit
def _products(
    whole,  # [M, D] float32
    parts,  # [K, M, D] float32, with a stride p_k of folds, where PARTS
    out,  # [K + 1 or 1, splits, M, M] float64: products over the columns of one split; tiles on and above the diagonal
    M, D, columns, p_k,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of the result, split of the columns, and left-out fold (none at first).

    BLOCK_D columns are summed in float32, their sums in float64.
    """
    tiles = tl.cdiv(M, BLOCK)
    tile_m, tile_n = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tile_n < tile_m:
        return
    split, fold = tl.program_id(1), tl.program_id(2) - 1
    m = tile_m * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    n = tile_n * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for start in range(split * columns, tl.minimum((split + 1) * columns, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = _tile(whole, parts, fold, m, d, M, D, p_k, PARTS)
        y = _tile(whole, parts, fold, n, d, M, D, p_k, PARTS)
        scale_x, back_x = _scale(x)
        scale_y, back_y = _scale(y)
        product = tl.dot(x * scale_x[:, None], tl.trans(y * scale_y[:, None]), input_precision=PRECISION)
        total += product.to(tl.float64) * (back_x.to(tl.float64)[:, None] * back_y.to(tl.float64)[None, :])
    place = ((tl.program_id(2).to(tl.int64) * tl.num_programs(1) + split) * M + m[:, None]) * M + n[None, :]
    tl.store(out + place, total, mask=(m < M)[:, None] & (n < M)[None, :])


# Launchers ------------------------------------------------------------------------------------------------------------


def gram(gradients: Tensor) -> Tensor:
    """Gram matrix of the normalised gradients; zero rows for zero gradients.

    On a GPU products are float32's (three of TF32), whatever the scale of the gradients, and sums float64's.

    Args:
        gradients: [M, ...] floating point; the kernel takes float32.

    Returns:
        K [M, M] float64, symmetric. The same bits every time.
    """
    if not takes(gradients, (torch.float32,)):
        return gram_reference(gradients)
    whole = gradients.flatten(1).contiguous()
    return _normalized(_launch(whole, None))[0]


def grams(parts: Tensor) -> tuple[Tensor, Tensor]:
    """`gram` of the gradients summed over folds, and of that sum without each fold.

    Args:
        parts: [K, M, ...] floating point; the kernel takes float32. The sum, and what is left of it without a fold, are
            of its dtype.

    Returns:
        [M, M] and [K, M, M], float64. The parts are read twice: once for their sum, once for all K + 1 matrices.
    """
    if not takes(parts, (torch.float32,)):
        return grams_reference(parts)
    parts = parts.flatten(2).contiguous()
    found = _normalized(_launch(parts.sum(0), parts))
    return found[0], found[1:]


def _launch(whole: Tensor, parts: Tensor | None) -> Tensor:
    """Products [1, M, M] of the gradients, or [K + 1, M, M]; the upper triangle alone."""
    m, width = whole.shape
    matrices = 1 if parts is None else 1 + len(parts)
    options = launch_options("gram", whole, min(next_power_of_2(m), 64))
    tiles = cdiv(m, options["BLOCK"])
    splits = max(1, min(cdiv(width, options["BLOCK_D"]), _PROGRAMS // tiles**2))
    columns = cdiv(cdiv(width, splits), options["BLOCK_D"]) * options["BLOCK_D"]
    splits = max(1, cdiv(width, columns)) if columns else 1
    out = torch.empty(matrices, splits, m, m, dtype=torch.float64, device=whole.device)
    if m:
        with on_device(whole):
            _products[(tiles * tiles, splits, matrices)](
                whole, whole if parts is None else parts, out, m, width, columns, 0 if parts is None else m * width,
                PARTS=parts is not None, PRECISION=precision_of(torch.float32), **options,
            )  # fmt: skip
    return out.sum(1)


def _normalized(products: Tensor) -> Tensor:
    """Products ⟨g_i, g_j⟩, i ≤ j, [..., M, M] → cosines, both triangles."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    cosines = (products * inverse[..., :, None] * inverse[..., None, :]).triu()
    return cosines + cosines.triu(1).transpose(-1, -2)
