"""Normalisation with the residual addition against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from rule import assert_by_rule

pytest.importorskip("triton")
from hgprompt.kernels import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _run(function, x, low, y, kind, stream, dtype):
    x, low = x.to(DEVICE, stream).requires_grad_(), None if low is None else low.to(DEVICE, stream)
    leaves = [x]
    if y is not None:
        y = y.to(DEVICE, dtype).requires_grad_()
        leaves.append(y)
    total, z = function(norm.Stream(x, low), y, kind, 1e-6, dtype)
    slope = torch.linspace(-3, 3, x.numel(), dtype=torch.float64, device=DEVICE).view(x.shape)
    value = (total.high.double() * slope.sin()).sum() + (z.double() * slope.cos()).sum()
    return total, z.detach(), *torch.autograd.grad(value, leaves)


def _sum(stream):
    """What a stream stands for, in float64."""
    return (stream.high.double() + (0 if stream.low is None else stream.low.double())).detach()


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(3, 5, 768), (1, 1, 16), (2, 9, 200), (7, 1152)], ids=str)
@pytest.mark.parametrize(
    ("added", "stream", "low"),
    [
        *((a, torch.float32, d) for d in (torch.float32, *LOW) for a in ("added", "alone")),
        *((a, d, d) for d in LOW for a in ("added", "added to two", "alone")),
    ],
    ids=str,
)
def test_equals_plain(kind, added, shape, stream, low):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, dtype=torch.float64, generator=generator) + 1
    y = None if added == "alone" else torch.randn(shape, dtype=torch.float64, generator=generator)
    # What the kernels are given is what is exact: the rounding of the inputs is nobody's error.
    rest = (x - x.to(stream)).to(stream).double() if added == "added to two" else None
    x, y = x.to(stream).double(), None if y is None else y.to(low).double()
    exact = _run(norm.add_normalize_reference, x, rest, y, kind, torch.float64, torch.float64)
    peer = _run(norm.add_normalize_reference, x, rest, y, kind, stream, low)
    actual = _run(norm.add_normalize, x, rest, y, kind, stream, low)
    assert (actual[0].low is None) == (stream == torch.float32 or y is None)
    assert_by_rule(_sum(actual[0]), _sum(peer[0]), _sum(exact[0]), 2, "the sum")
    for i, (a, p, e) in enumerate(zip(actual[1:], peer[1:], exact[1:], strict=True)):
        assert a.dtype == p.dtype
        assert_by_rule(a, p, e, 2 if i < 1 else 3, f"result {i}")


@pytest.mark.parametrize("function", [norm.add_normalize, norm.add_normalize_reference])
def test_a_stream_of_two_tensors_forgets_nothing(function):
    """A hundred additions: bfloat16 alone would lose 2^-9 of the stream at each; two tensors of it lose 2^-17."""
    generator = torch.Generator().manual_seed(3)
    begin, *parts = (torch.randn(4, 64, generator=generator).bfloat16() for _ in range(101))
    stream = norm.Stream(begin.to(DEVICE))
    for part in parts:
        stream, _ = function(stream, part.to(DEVICE), "layer", 1e-6, torch.bfloat16)
    assert stream.high.dtype == stream.low.dtype == torch.bfloat16
    exact = sum((p.double() for p in parts), begin.double())
    # The largest of the partial sums is about 30: a hundred errors of at most 30 · 2^-17 each.
    assert (_sum(stream).cpu() - exact).abs().max() < 100 * 30 * 2**-17
    alone = begin
    for part in parts:
        alone = alone + part
    assert (alone.double() - exact).abs().max() > 10 * (_sum(stream).cpu() - exact).abs().max()


def test_what_is_added_and_the_stream_share_a_gradient():
    """One tensor of bfloat16, where a float32 stream has one of each dtype."""
    x, y = (torch.randn(3, 32, device=DEVICE).bfloat16().requires_grad_() for _ in range(2))
    _, z = norm.add_normalize(norm.Stream(x), y, "layer", 1e-6, torch.bfloat16)
    dx, dy = torch.autograd.grad(z.float().square().sum(), (x, y))
    assert dx.dtype == torch.bfloat16
    assert dx.data_ptr() == dy.data_ptr()


def test_a_constant_row_and_a_large_mean():
    """Variance 0: eps decides, nothing is infinite. A mean of 1e4 times the spread: the variance is taken about it."""
    x = torch.zeros(2, 64)
    x[0] = 5
    x[1] = 1e4 + torch.linspace(-1, 1, 64)
    z = norm.add_normalize(norm.Stream(x.to(DEVICE)), None, "layer", 1e-6, torch.float32)[1].cpu()
    assert torch.equal(z[0], torch.zeros(64))
    exact = norm.normalize(x.double(), "layer", 1e-6)
    # float32 knows 1e4 ± 1 to 5e-4.
    torch.testing.assert_close(z[1].double(), exact[1], rtol=0, atol=2e-3)


def test_one_output_unused():
    x, y = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    total, z = norm.add_normalize(norm.Stream(x), y, "layer", 1e-6, torch.float32)
    dx, dy = torch.autograd.grad(total.value().sum(), (x, y), retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dy, torch.ones_like(x))
    (only,) = torch.autograd.grad(z.square().sum() + z.sum(), x)
    leaf = x.detach().double().requires_grad_()
    n = norm.normalize(leaf + y.detach().double(), "layer", 1e-6)
    (expected,) = torch.autograd.grad(n.square().sum() + n.sum(), leaf)
    torch.testing.assert_close(only.double(), expected, rtol=0, atol=1e-5)  # cancels to nearly zero


def test_no_rows():
    total, z = norm.add_normalize(norm.Stream(torch.empty(2, 0, 16)), torch.empty(2, 0, 16), "rms", 1e-6, torch.float16)
    assert total.high.shape == z.shape == (2, 0, 16)


def test_operator_is_well_behaved():
    x, y = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    low = [t.detach().bfloat16().requires_grad_(i < 2) for i, t in enumerate((x, y, x / 512))]
    for args in (
        (x, None, y, True, 1e-6, torch.float32), (x, None, None, False, 1e-6, torch.float32),
        (low[0], low[2], low[1], True, 1e-6, torch.bfloat16),
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.hgprompt.add_normalize.default, args)
