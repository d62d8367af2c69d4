"""Class sums and second moments of the features of M prompts about a pilot centre, added to what is there.

The features come as the network's last block leaves them: pooled and normed, so nothing is normalised here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hgprompt.kernels.compiler import (
    cdiv,
    copied,
    jit,
    launch_options,
    on_device,
    precision_of,
    takes,
    tl,
    with_dense_rows,
)

# What plain PyTorch computes ------------------------------------------------------------------------------------------


def class_sums_reference(features: Tensor, centre: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """The specification of `class_sums`."""
    y = features.double() - centre.double()[:, None]
    indicator = torch.nn.functional.one_hot(index.to(y.device), num_classes).double()
    return torch.einsum("nc,mnh->mch", indicator, y)


def add_moments_reference(rows: Sequence[Tensor], features: Tensor, centre: Tensor) -> None:
    """The specification of `add_moments`."""
    y = features.double() - centre.double()[:, None]
    for i, row in enumerate(rows):
        row += torch.einsum("bk,mbl->kml", y[i], y[i:])


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _class_sums(
    features,  # element (m, b, d) at m · f_m + b · f_b + d
    centre,  # [M, H] float64
    order,  # [B] int64: images by class
    starts,  # [C + 1] int64: where in `order` each class begins
    out,  # [M, C, H] float64
    f_m, f_b,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program per prompt, class and stretch of the width: it reads the images of its class, and no others."""
    d = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    label, m = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = tl.load(starts + label), tl.load(starts + label + 1)
    middle = tl.load(centre + m * H + d, mask=d < H, other=0.0)
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float64)
    for start in range(begin, end, BLOCK_B):
        n = start + tl.arange(0, BLOCK_B)
        b = tl.load(order + n, mask=n < end, other=0)
        inside = (n < end)[:, None] & (d < H)[None, :]
        f = tl.load(features + m * f_m + b[:, None] * f_b + d[None, :], mask=inside, other=0.0)
        total += tl.where(inside, f.to(tl.float64) - middle[None, :], 0.0)
    place = (m * tl.num_programs(1) + label) * H + d
    tl.store(out + place, tl.sum(total, 0), mask=d < H)


@jit
def _add_block_row(
    row,  # [H, M, H] float64, added to: products of the first prompt with all
    features,  # element (m, b, d) at m · f_m + b · f_b + d, from the row's first prompt on
    high, low,  # [M, H] float32: centre = high + low
    M, B, f_m, f_b,
    H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of one prompt's block. CHUNK images are summed in float32, their sums in float64."""
    tiles = tl.cdiv(H, BLOCK)
    k = (tl.program_id(0) // tiles) * BLOCK + tl.arange(0, BLOCK)
    l = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    k_high = tl.load(high + k, mask=k < H, other=0.0)[:, None]
    k_low = tl.load(low + k, mask=k < H, other=0.0)[:, None]
    l_high = tl.load(high + m * H + l, mask=l < H, other=0.0)[None, :]
    l_low = tl.load(low + m * H + l, mask=l < H, other=0.0)[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for chunk in range(0, B, CHUNK):
        partial = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(chunk, tl.minimum(chunk + CHUNK, B), BLOCK_B):
            b = start + tl.arange(0, BLOCK_B).to(tl.int64)
            here = b < B
            x = tl.load(features + k[:, None] + b[None, :] * f_b, mask=(k < H)[:, None] & here[None, :], other=0.0)
            y = tl.load(
                features + m * f_m + b[:, None] * f_b + l[None, :], mask=here[:, None] & (l < H)[None, :], other=0.0
            )
            # What is missing would be -centre; zero on one side is zero in the product.
            x = tl.where(here[None, :], x.to(tl.float32) - k_high - k_low, 0.0)
            y = y.to(tl.float32) - l_high - l_low
            partial = tl.dot(x, y, partial, input_precision=PRECISION)
        total += partial.to(tl.float64)
    place = row + (k.to(tl.int64)[:, None] * M + m) * H + l[None, :]
    inside = (k < H)[:, None] & (l < H)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


# Launchers ------------------------------------------------------------------------------------------------------------


def class_sums(features: Tensor, centre: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """Sums of f - centre over the images of each class, in float64; summed over classes, the sums over all images.

    Args:
        features: [M, B, h], floating point, of any strides. centre: [M, h], on the same device.
        index: class of each image [B], int64, from 0 to C-1, on any device. num_classes: C.

    Returns:
        [M, C, h] float64; zeros for a class without images. The same bits every time.
    """
    if not takes(features):
        return class_sums_reference(features, centre, index, num_classes)
    features = with_dense_rows(features)
    m, _, h = features.shape
    index = copied(index, features.device)
    order = index.argsort(stable=True)
    starts = torch.searchsorted(index[order], torch.arange(num_classes + 1, device=index.device))
    out = torch.empty(m, num_classes, h, dtype=torch.float64, device=features.device)
    if out.numel():
        options = launch_options("class_sums", features, 0)
        with on_device(features):
            _class_sums[(cdiv(h, options["BLOCK_H"]), num_classes, m)](
                features, centre.double().contiguous(), order, starts, out, features.stride(0), features.stride(1),
                H=h, **options,
            )  # fmt: skip
    return out


def add_moments(rows: Sequence[Tensor], features: Tensor, centre: Tensor) -> None:
    """Add Σ y_i y_jᵀ, y = f - centre, to the blocks of all pairs of prompts i ≤ j.

    On a GPU products are float32's (three of TF32), summed in float32 over at most CHUNK images, beyond that in
    float64. The blocks of a prompt with itself are symmetric up to that rounding. The same bits every time.

    Args:
        rows: M contiguous float64 tensors as in `hgprompt.moments.Moments.rows`: rows[i] [h, M-i, h] holds the block of
            prompts i and j at [:, j-i]. Changed in place.
        features: [M, B, h], floating point, of any strides. centre: [M, h], on the same device; a float64 one is not
            rounded to float32.
    """
    if not takes(features):
        add_moments_reference(rows, features, centre)
        return
    for i, row in enumerate(rows):
        if row.dtype != torch.float64 or not row.is_contiguous():
            raise ValueError(f"rows[{i}] must be contiguous float64, got {row.dtype}, strides {row.stride()}")
    features = with_dense_rows(features)
    m, b, h = features.shape
    # float32 alone would move the centre; in two parts it is known to 48 bits.
    high = centre.float().contiguous()
    low = (centre.double() - high.double()).float().contiguous()
    options = launch_options("add_moments", features, 0)
    tiles = cdiv(h, options["BLOCK"])
    with on_device(features):
        for i, row in enumerate(rows if b else ()):
            _add_block_row[(tiles * tiles, m - i)](
                row, features[i:], high[i:], low[i:], m - i, b, features.stride(0), features.stride(1),
                H=h, PRECISION=precision_of(torch.float32), **options,
            )  # fmt: skip
