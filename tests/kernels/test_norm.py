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


def _run(function, x, y, kind, stream, low):
    x = x.to(DEVICE, stream).requires_grad_()
    leaves = [x]
    if y is not None:
        y = y.to(DEVICE, low).requires_grad_()
        leaves.append(y)
    total, z = function(x, y, kind, 1e-6, low)
    slope = torch.linspace(-3, 3, x.numel(), dtype=torch.float64, device=DEVICE).view(x.shape)
    value = (total.double() * slope.sin()).sum() + (z.double() * slope.cos()).sum()
    return total.detach(), z.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("added", [True, False], ids=["added", "alone"])
@pytest.mark.parametrize("shape", [(3, 5, 768), (1, 1, 16), (2, 9, 200), (7, 1152)], ids=str)
@pytest.mark.parametrize(
    ("stream", "low"), [(torch.float32, torch.float32), *((s, d) for d in LOW for s in (torch.float32, d))], ids=str
)
def test_equals_plain(kind, added, shape, stream, low):
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(shape, dtype=torch.float64, generator=generator) + 1
    y = torch.randn(shape, dtype=torch.float64, generator=generator) if added else None
    # What the kernels are given is what is exact: the rounding of the inputs is nobody's error.
    x, y = x.to(stream).double(), None if y is None else y.to(low).double()
    exact = _run(norm.add_normalize_reference, x, y, kind, torch.float64, torch.float64)
    peer = _run(norm.add_normalize_reference, x, y, kind, stream, low)
    actual = _run(norm.add_normalize, x, y, kind, stream, low)
    for i, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert a.dtype == p.dtype
        assert_by_rule(a, p, e, 2 if i < 2 else 3, f"result {i}")


def test_a_constant_row_and_a_large_mean():
    """Variance 0: eps decides, nothing is infinite. A mean of 1e4 times the spread: the variance is taken about it."""
    x = torch.zeros(2, 64)
    x[0] = 5
    x[1] = 1e4 + torch.linspace(-1, 1, 64)
    z = norm.add_normalize(x.to(DEVICE), None, "layer", 1e-6, torch.float32)[1].cpu()
    assert torch.equal(z[0], torch.zeros(64))
    exact = norm.normalize(x.double(), "layer", 1e-6)
    # float32 knows 1e4 ± 1 to 5e-4.
    torch.testing.assert_close(z[1].double(), exact[1], rtol=0, atol=2e-3)


def test_one_output_unused():
    x, y = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    total, z = norm.add_normalize(x, y, "layer", 1e-6, torch.float32)
    dx, dy = torch.autograd.grad(total.sum(), (x, y), retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    assert torch.equal(dy, torch.ones_like(x))
    (only,) = torch.autograd.grad(z.square().sum() + z.sum(), x)
    leaf = x.detach().double().requires_grad_()
    n = norm.normalize(leaf + y.detach().double(), "layer", 1e-6)
    (expected,) = torch.autograd.grad(n.square().sum() + n.sum(), leaf)
    torch.testing.assert_close(only.double(), expected, rtol=0, atol=1e-5)  # cancels to nearly zero


def test_no_rows():
    total, z = norm.add_normalize(torch.empty(2, 0, 16), torch.empty(2, 0, 16), "rms", 1e-6, torch.float16)
    assert total.shape == z.shape == (2, 0, 16)


def test_operator_is_well_behaved():
    x, y = (torch.randn(3, 32, device=DEVICE, requires_grad=True) for _ in range(2))
    for args in ((x, y, True, 1e-6, torch.float32), (x, None, False, 1e-6, torch.float32)):
        torch.library.opcheck(torch.ops.hgprompt.add_normalize.default, args)
