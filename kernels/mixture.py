"""Mixtures over prompts and their pull-backs: of features, and of the blocks of second moments.

What the solver asks for at every step. All are sums over tensors far larger than what comes out, so each tensor is read
once, at its own width, and everything is added in float64, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hgprompt.kernels.compiler import (
    available,
    cdiv,
    copied,
    jit,
    launch_options,
    on_device,
    takes,
    tl,
    with_dense_rows,
)

# What plain PyTorch computes ------------------------------------------------------------------------------------------


def mix_reference(features: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """The specification of `mix`."""
    return torch.tensordot(weights, features.double() - means[:, None], dims=1)


def pull_back_mixture_reference(slope: Tensor, features: Tensor, means: Tensor) -> Tensor:
    """The specification of `pull_back_mixture`."""
    return torch.mv((features.double() - means[:, None]).flatten(1), slope.flatten())


def assemble_reference(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The specification of `assemble`."""
    total = torch.zeros_like(rows[0][:, 0])
    for i, row in enumerate(rows):
        factors = weights[i] * weights[i:]
        factors[1:] *= 2
        total += torch.einsum("m,kml->kl", factors, row)
    return (total + total.T) / 2


def block_products_reference(rows: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """The specification of `block_products`."""
    products = matrix.new_zeros(len(rows), len(rows))
    for i, row in enumerate(rows):
        products[i, i:] = torch.einsum("kl,kml->m", matrix, row)
    return products + products.triu(1).T


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _mix(
    features,  # element (m, b, d) at m · f_m + b · f_b + d
    means,  # [M, H] float64
    weights,  # [M] float64
    out,  # [B, H] float64
    M, B, f_m, f_b,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (b < B)[:, None] & (d < H)[None, :]
    place = features + b[:, None] * f_b + d[None, :]
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float64)
    for i in tl.range(0, M, num_stages=STAGES):
        f = tl.load(place, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(means + i * H + d, mask=d < H, other=0.0)
        total += tl.load(weights + i) * (f - mean[None, :])
        place += f_m
    tl.store(out + b[:, None] * H + d[None, :], total, mask=inside)


@jit
def _pull_back(
    slope,  # [B, H] float64
    features,  # element (m, b, d) at m · f_m + b · f_b + d
    means,  # [M, H] float64
    out,  # [M, programs] float64: each program's share of the products
    M, B, f_m, f_b,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (b < B)[:, None] & (d < H)[None, :]
    place = features + b[:, None] * f_b + d[None, :]
    s = tl.load(slope + b[:, None] * H + d[None, :], mask=inside, other=0.0)  # 0 outside, so are the products
    mine = out + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    for i in tl.range(0, M, num_stages=STAGES):
        f = tl.load(place, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(means + i * H + d, mask=d < H, other=0.0)
        tl.store(mine + i * programs, tl.sum(tl.sum(s * (f - mean[None, :]), 1), 0))
        place += f_m


@jit
def _assemble(
    rows,  # float64; row i, [H, M - i, H], begins UNIT · offsets[i] elements from here
    offsets,  # [M] int64
    factors,  # [M, M] float64
    out,  # [H, H] float64
    M,
    H: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per stretch of the result: it reads that stretch of every block."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < H * H
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(M):
        place = rows + tl.load(offsets + i) * UNIT + (e // H).to(tl.int64) * ((M - i) * H) + e % H
        for j in tl.range(i, M, num_stages=STAGES):
            total += tl.load(factors + i * M + j) * tl.load(place, mask=inside, other=0.0)
            place += H
    tl.store(out + e, total, mask=inside)


@jit
def _block_products(
    matrix,  # [H, H] float64
    rows, offsets,  # as for `_assemble`
    out,  # [M, M, programs] float64, i ≤ j alone: each program's share of the products
    M,
    H: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per stretch of a block and row of blocks."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.program_id(1)
    inside = e < H * H
    g = tl.load(matrix + e, mask=inside, other=0.0)
    place = rows + tl.load(offsets + i) * UNIT + (e // H).to(tl.int64) * ((M - i) * H) + e % H
    programs = tl.num_programs(0).to(tl.int64)
    mine = out + (i * M + i) * programs + tl.program_id(0)
    for _ in tl.range(i, M, num_stages=STAGES):
        tl.store(mine, tl.sum(g * tl.load(place, mask=inside, other=0.0), 0))
        place += H
        mine += programs


# Launchers ------------------------------------------------------------------------------------------------------------


def mix(features: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """Σ_i α_i (F_i - mean_i) in float64, without a float64 copy of the features.

    Args:
        features: F [M, N, h], floating point, of any strides. means: [M, h] float64. weights: α [M] float64.

    Returns:
        [N, h] float64. The same bits every time.
    """
    weights = copied(weights, features.device)
    if not takes(features):
        return mix_reference(features, means, weights)
    features = with_dense_rows(features)
    m, n, h = features.shape
    out = torch.empty(n, h, dtype=torch.float64, device=features.device)
    if out.numel():
        options = launch_options("mix", features, 0)
        with on_device(features):
            _mix[(cdiv(n, options["BLOCK_B"]), cdiv(h, options["BLOCK_H"]))](
                features, means.contiguous(), weights.contiguous(), out, m, n, features.stride(0), features.stride(1),
                H=h, **options,
            )  # fmt: skip
    return out


def pull_back_mixture(slope: Tensor, features: Tensor, means: Tensor) -> Tensor:
    """⟨S, F_i - mean_i⟩ for all i: the gradient in α of whatever has the gradient S in `mix`.

    Args:
        slope: S [N, h] float64. features: F [M, N, h], floating point, of any strides. means: [M, h] float64.

    Returns:
        [M] float64. The same bits every time: programs' shares are added afterwards, in their order.
    """
    if not takes(features):
        return pull_back_mixture_reference(slope, features, means)
    features = with_dense_rows(features)
    m, n, h = features.shape
    options = launch_options("pull_back_mixture", features, 0)
    grid = cdiv(n, options["BLOCK_B"]), cdiv(h, options["BLOCK_H"])
    shares = torch.empty(m, grid[0] * grid[1], dtype=torch.float64, device=features.device)
    if shares.numel():
        with on_device(features):
            _pull_back[grid](
                slope.contiguous(), features, means.contiguous(), shares, m, n, features.stride(0), features.stride(1),
                H=h, **options,
            )  # fmt: skip
    return shares.sum(1)


def assemble(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_ij α_i α_j C_ij, symmetric, from the blocks i ≤ j.

    Args:
        rows: M float64 tensors as in `hgprompt.moments.Moments.rows`: rows[i] [h, M-i, h] holds C_ij at [:, j-i].
        weights: α [M] float64.

    Returns:
        [h, h] float64. The same bits every time.
    """
    weights = weights.to(rows[0].device)
    if not available(rows[0].device):
        return assemble_reference(rows, weights)
    first, offsets, unit = _addresses(rows)
    h, m = first.shape[0], len(rows)
    factors = torch.outer(weights, weights) * 2
    factors.diagonal().div_(2)
    total = torch.empty(h, h, dtype=torch.float64, device=first.device)
    options = launch_options("assemble", first, 0)
    with on_device(first):
        _assemble[(cdiv(h * h, options["BLOCK"]),)](first, offsets, factors, total, m, H=h, UNIT=unit, **options)
    return (total + total.T) / 2


def block_products(rows: Sequence[Tensor], matrix: Tensor) -> Tensor:
    """⟨G, C_ij⟩ for all pairs of prompts, from the blocks i ≤ j.

    Args:
        rows: as for `assemble`. matrix: symmetric G [h, h] float64.

    Returns:
        [M, M] float64, symmetric. The same bits every time: programs' shares are added afterwards, in their order.
    """
    if not available(rows[0].device):
        return block_products_reference(rows, matrix)
    first, offsets, unit = _addresses(rows)
    h, m = first.shape[0], len(rows)
    options = launch_options("block_products", first, 0)
    programs = cdiv(h * h, options["BLOCK"])
    shares = torch.empty(m, m, programs, dtype=torch.float64, device=first.device)
    with on_device(first):
        _block_products[(programs, m)](
            matrix.contiguous(), first, offsets, shares, m, H=h, UNIT=unit, **options
        )  # fmt: skip
    products = shares.sum(2).triu()
    return products + products.triu(1).T


def _addresses(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """The first row, and where all rows begin, counted from it in units of 1 or 2 elements.

    One launch for all rows, wherever they lie: M launches would take longer than the reading. In units of 16 bytes, the
    compiler knows that wide loads are allowed.
    """
    for i, row in enumerate(rows):
        if row.dtype != torch.float64 or not row.is_contiguous():
            raise ValueError(f"rows[{i}] must be contiguous float64, got {row.dtype}, strides {row.stride()}")
    begin = rows[0].data_ptr()
    distances = [(row.data_ptr() - begin) // 8 for row in rows]
    unit = 1 if any(d % 2 for d in distances) else 2
    return rows[0], copied(torch.tensor([d // unit for d in distances], device="cpu"), rows[0].device), unit
