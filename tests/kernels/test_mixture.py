"""Mixtures and their pull-backs against plain PyTorch in float64.

Kernel and specification are both float64 and differ in the order of their sums: one rounding for every term, relative
to the sum of the terms' magnitudes, bounds the difference.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from hgprompt.kernels import mixture
from hgprompt.moments import Moments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 5), (2, 7, 17), (5, 130, 48), (13, 33, 192)]  # prompts, images, width
BLOCKS = [(1, 5), (2, 17), (13, 48), (3, 192)]  # prompts, width
ROUNDING = 2**-53
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def _features(m, n, h, dtype):
    features = (_random(m, n, h) + 3).to(dtype)
    return features, features.double().mean(1)


def _rows(m, h):
    return [_random(h, m - i, h, seed=i) for i in range(m)]


def _assert_within(actual, exact, terms, magnitude):
    assert actual.dtype == torch.float64
    assert actual.shape == exact.shape
    assert bool(((actual - exact).abs() <= terms * ROUNDING * magnitude).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mix_equals_plain(shape, dtype):
    features, means = _features(*shape, dtype)
    weights = _random(shape[0], seed=1)
    actual = mixture.mix(features, means, weights)
    magnitude = torch.tensordot(weights.abs(), (features.double() - means[:, None]).abs(), dims=1)
    _assert_within(actual, mixture.mix_reference(features, means, weights), shape[0] + 2, magnitude)
    assert torch.equal(actual, mixture.mix(features, means, weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pull_back_equals_plain(shape, dtype):
    features, means = _features(*shape, dtype)
    slope = _random(*shape[1:], seed=1)
    actual = mixture.pull_back_mixture(slope, features, means)
    magnitude = ((features.double() - means[:, None]) * slope).abs().sum((1, 2))
    exact = mixture.pull_back_mixture_reference(slope, features, means)
    _assert_within(actual, exact, slope.numel() + 2, magnitude)
    assert torch.equal(actual, mixture.pull_back_mixture(slope, features, means))


@pytest.mark.parametrize("layout", ["images first", "columns", "every other"])
def test_any_strides(layout):
    features, means = _features(3, 40, 20, torch.float32)
    if layout == "images first":
        given = features.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "columns":
        given = torch.cat([features, features.new_full((3, 40, 4), torch.nan)], dim=2)[:, :, :20]
    else:
        given = features.repeat_interleave(2, dim=2)[:, :, ::2]
    weights, slope = _random(3, seed=1), _random(20, 40, seed=2).T
    assert torch.equal(mixture.mix(given, means, weights), mixture.mix(features, means, weights))
    found = [mixture.pull_back_mixture(s, f, means) for s in (slope, slope.contiguous()) for f in (given, features)]
    assert all(torch.equal(f, found[0]) for f in found)


def test_pull_back_is_the_gradient_of_mix():
    """Linear in the weights: ⟨S, mix(α)⟩ = ⟨pull-back of S, α⟩."""
    features, means = _features(5, 30, 17, torch.float16)
    weights, slope = _random(5, seed=1), _random(30, 17, seed=2)
    value = (slope * mixture.mix(features, means, weights)).sum()
    torch.testing.assert_close(mixture.pull_back_mixture(slope, features, means) @ weights, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("m", "h"), BLOCKS)
def test_assemble_equals_plain(m, h):
    rows, weights = _rows(m, h), _random(m, seed=99)
    actual = mixture.assemble(rows, weights)
    magnitude = mixture.assemble_reference([row.abs() for row in rows], weights.abs())
    _assert_within(actual, mixture.assemble_reference(rows, weights), m * m + 2, magnitude)
    assert torch.equal(actual, actual.T)
    assert torch.equal(actual, mixture.assemble(rows, weights))


@pytest.mark.parametrize(("m", "h"), BLOCKS)
def test_block_products_equal_plain(m, h):
    rows, matrix = _rows(m, h), _random(h, h, seed=99)
    matrix = matrix + matrix.T
    actual = mixture.block_products(rows, matrix)
    magnitude = mixture.block_products_reference([row.abs() for row in rows], matrix.abs())
    _assert_within(actual, mixture.block_products_reference(rows, matrix), h * h + 2, magnitude)
    assert torch.equal(actual, actual.T)
    assert torch.equal(actual, mixture.block_products(rows, matrix))


@pytest.mark.parametrize("h", [6, 7])
def test_rows_may_lie_anywhere(h):
    """In one buffer, side by side (with an odd width, off the 16-byte grid), or in an order of their own."""
    m = 4
    rows, weights, matrix = _rows(m, h), _random(m, seed=99), _random(h, h, seed=98)
    buffer = torch.cat([row.flatten() for row in reversed(rows)])
    views, end = [], buffer.numel()
    for row in rows:
        views.append(buffer[end - row.numel() : end].view(row.shape))
        end -= row.numel()
    assert torch.equal(mixture.assemble(views, weights), mixture.assemble(rows, weights))
    assert torch.equal(mixture.block_products(views, matrix), mixture.block_products(rows, matrix))


def test_rows_are_refused_unless_contiguous_float64():
    # Made where they are used: a copy to another device would close the gaps.
    gaps = torch.zeros(4, 1, 8, dtype=torch.float64, device=DEVICE)[:, :, ::2]
    for row in (gaps, torch.zeros(4, 1, 4, device=DEVICE)):
        with pytest.raises(ValueError, match="contiguous float64"):
            mixture.assemble([row], torch.ones(1, dtype=torch.float64))


def test_the_specification_is_what_moments_does():
    kept = Moments(3, 7)
    kept.update(_random(3, 20, 7), torch.zeros(20, dtype=torch.int64))
    weights, matrix = _random(3, seed=1), _random(7, 7, seed=2)
    matrix = matrix + matrix.T
    torch.testing.assert_close(mixture.assemble(kept.rows, weights), kept.quadratic(weights), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.block_products(kept.rows, matrix), kept.inner(matrix), rtol=1e-12, atol=1e-12)


def test_float64_features_are_mixed_plainly():
    features, means = _features(2, 5, 7, torch.float64)
    weights, slope = _random(2, seed=1), _random(5, 7, seed=2)
    assert torch.equal(mixture.mix(features, means, weights), mixture.mix_reference(features, means, weights))
    expected = mixture.pull_back_mixture_reference(slope, features, means)
    assert torch.equal(mixture.pull_back_mixture(slope, features, means), expected)
