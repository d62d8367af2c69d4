"""Class sums and second moments against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from rule import assert_by_rule

pytest.importorskip("triton")
from hgprompt.kernels import moments
from hgprompt.moments import Moments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 products are wrong, but here the product is float32's.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Prompts, images, width, classes.
SHAPES = [(1, 1, 5, 1), (2, 7, 17, 2), (5, 130, 48, 11), (13, 7, 48, 2), (2, 130, 192, 11)]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _inputs(m, b, h, num_classes, dtype, mean=3.0):
    g = torch.Generator().manual_seed(0)
    features = (torch.randn(m, b, h, generator=g, dtype=torch.float64) + mean).to(DEVICE, dtype)
    centre = features.double().mean(1) + 0.1
    index = torch.randint(num_classes, (b,), generator=g)
    index[index == 1] = 0  # no image of class 1
    return features, centre, index


def _blocks(m, h):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(h, m - i, h, generator=g, dtype=torch.float64).to(DEVICE) for i in range(m)]


def _added(function, rows, *arguments):
    """What was added to the rows."""
    after = [row.clone() for row in rows]
    function(after, *arguments)
    return [a - row for a, row in zip(after, rows, strict=True)]


def _in_float32(rows, features, centre):
    """The specification in float32: PyTorch's own result in that precision."""
    y = features.float() - centre.float()[:, None]
    for i, row in enumerate(rows):
        row += torch.einsum("bk,mbl->kml", y[i], y[i:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_class_sums_equal_plain(shape, dtype):
    features, centre, index = _inputs(*shape, dtype)
    actual = moments.class_sums(features, centre, index, shape[3])
    exact = moments.class_sums_reference(features, centre, index, shape[3])
    # The same float64 differences in another order: one rounding for each image, of at most the sum of magnitudes.
    bound = shape[1] * 2**-53 * (features.double() - centre[:, None]).abs().sum(1)
    assert actual.dtype == torch.float64
    assert bool(((actual - exact).abs() <= bound[:, None]).all())
    assert shape[3] < 2 or torch.equal(actual[:, 1], torch.zeros_like(actual[:, 1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_equal_plain(shape, dtype):
    features, centre, _ = _inputs(*shape, dtype)
    rows = _blocks(shape[0], shape[2])
    actual = _added(moments.add_moments, rows, features, centre)
    exact = _added(moments.add_moments_reference, rows, features, centre)
    peer = _added(_in_float32, rows, features, centre)
    for i, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert_by_rule(a.float(), p, e, 2, f"row {i}")  # products are float32's: so is the rule


def test_the_same_bits_every_time():
    features, centre, index = _inputs(2, 130, 192, 3, DTYPES[1])
    first, second = (moments.class_sums(features, centre, index, 3) for _ in range(2))
    assert torch.equal(first, second)
    rows = _blocks(2, 192)
    first, second = (_added(moments.add_moments, rows, features, centre) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_mean_far_from_zero_costs_nothing():
    """A mean of 3,000 times the spread: float32's centre alone would be off by 1e-4 of the spread."""
    features, centre, _ = _inputs(2, 130, 17, 1, torch.float32, mean=3e3)
    rows = [torch.zeros(17, 2 - i, 17, dtype=torch.float64, device=DEVICE) for i in range(2)]
    exact = _added(moments.add_moments_reference, rows, features, centre)
    y = (features.double() - centre[:, None]).abs()
    # y is rounded twice and the product once; at most 128 of them are added in float32, 3 TF32 products err by 2^-21.
    # All of it relative to the sum of the products' magnitudes.
    bound = (128 + 2 * 2 + 1 + 8) * 2**-24
    for i, (a, e) in enumerate(zip(_added(moments.add_moments, rows, features, centre), exact, strict=True)):
        assert bool(((a - e).abs() <= bound * torch.einsum("bk,mbl->kml", y[i], y[i:])).all())


@pytest.mark.parametrize("layout", ["images first", "columns", "every other"])
def test_any_strides(layout):
    features, centre, index = _inputs(3, 9, 20, 2, torch.float32)
    if layout == "images first":
        given = features.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "columns":
        given = torch.cat([features, features.new_full((3, 9, 4), torch.nan)], dim=2)[:, :, :20]
    else:
        given = features.repeat_interleave(2, dim=2)[:, :, ::2]
    assert not given.is_contiguous()
    assert torch.equal(
        moments.class_sums(given, centre, index, 2), moments.class_sums(features, centre, index, 2)
    )  # fmt: skip
    rows = _blocks(3, 20)
    a, b = (_added(moments.add_moments, rows, x, centre) for x in (given, features))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_images():
    features, centre = torch.empty(2, 0, 8, device=DEVICE), torch.zeros(2, 8, dtype=torch.float64, device=DEVICE)
    sums = moments.class_sums(features, centre, torch.empty(0, dtype=torch.int64), 3)
    assert torch.equal(sums, torch.zeros(2, 3, 8, dtype=torch.float64, device=DEVICE))
    assert all(not row.any() for row in _added(moments.add_moments, _blocks(2, 8), features, centre))


def test_rows_are_refused_unless_contiguous():
    features, centre, _ = _inputs(1, 3, 8, 1, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        moments.add_moments([torch.zeros(8, 1, 16, dtype=torch.float64, device=DEVICE)[:, :, ::2]], features, centre)


def test_the_specification_is_what_moments_keeps():
    """`hgprompt.moments.Moments`, and float64 features, which no kernel takes: the same sums, plainly computed."""
    features, _, index = _inputs(3, 20, 7, 3, torch.float64)
    kept = Moments(3, 7)
    kept.update(features, index)
    rows = [torch.zeros_like(row) for row in kept.rows]
    moments.add_moments(rows, features, kept.centre)
    for mine, theirs in zip(rows, kept.rows, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    sums = moments.class_sums(features, kept.centre, index, 3)
    torch.testing.assert_close(sums.sum(1), kept.sums, rtol=1e-12, atol=1e-12)
    for label, total in kept.class_sums.items():
        torch.testing.assert_close(sums[:, label], total, rtol=1e-12, atol=1e-12)
