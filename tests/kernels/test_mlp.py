"""The MLP's kernels against plain PyTorch in float64."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from rule import assert_by_rule

pytest.importorskip("triton")
from hgprompt.kernels import activation as activations
from hgprompt.kernels import linear, mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _weights(d, f, e, gated, bias):
    generator = torch.Generator().manual_seed(1)
    rows = 2 * f if gated else f
    w1, w2 = (torch.randn(s, dtype=torch.float64, generator=generator) / s[1] ** 0.5 for s in ((rows, d), (e, f)))
    b1, b2 = (torch.randn(n, dtype=torch.float64, generator=generator) if bias else None for n in (rows, e))
    return w1, b1, w2, b2


def _run(function, x, weights, dtype, *rest):
    x = x.to(DEVICE, dtype).requires_grad_()
    w1, b1, w2, b2 = (None if w is None else w.to(DEVICE, dtype) for w in weights)
    out = function(x, w1, b1, w2, b2, *rest)
    slope = torch.linspace(-3, 3, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    return out.detach(), torch.autograd.grad((out * slope).sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("form", "gated"), [("library", False), ("library", True), ("fused", False)], ids=["library", "gated", "fused"]
)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
@pytest.mark.parametrize(("shape", "f", "e"), [((2, 9, 40), 72, 40), ((1, 1, 16), 16, 24)], ids=str)
def test_equals_plain(shape, f, e, activation, form, gated, bias, dtype):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = _weights(shape[-1], f, e, gated, bias)
    exact = _run(mlp.mlp_reference, x, weights, torch.float64, activation, gated)
    peer = _run(mlp.mlp_reference, x, weights, dtype, activation, gated)
    actual = _run(mlp.mlp, x, weights, dtype, activation, gated, form)
    assert_by_rule(actual[0], peer[0], exact[0], 2, "output")
    assert_by_rule(actual[1], peer[1], exact[1], 3, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 8, 8), (150, 96, 200), (130, 64, 136), (300, 136, 264)])
def test_products_with_an_epilogue(rows, inner, columns, dtype, monkeypatch):
    """Several tiles for one program, on a GPU too, and tiles that end beyond the tensor, or with it."""
    monkeypatch.setattr(linear, "_multiprocessors", lambda device: 1)
    g = torch.Generator().manual_seed(0)
    x, weight, bias, slope = (
        torch.randn(s, dtype=torch.float64, generator=g) for s in ((rows, inner), (columns, inner), columns, rows)
    )
    weight, slope = weight / inner**0.5, slope[:, None].expand(rows, columns).contiguous()
    if not linear.available(torch.empty(0, dtype=dtype, device=DEVICE), inner, columns):
        pytest.skip("needs tensor descriptors: sm_90")

    def run(ahead, back, dtype):
        a, w, b, s = (t.to(DEVICE, dtype) for t in (x, weight, bias, slope))
        return *ahead(a, w, b, "gelu"), back(a, w.t().contiguous(), s)

    exact = run(linear.linear_activate_reference, linear.linear_multiply_reference, torch.float64)
    peer = run(linear.linear_activate_reference, linear.linear_multiply_reference, dtype)
    found = run(functools.partial(linear.linear_activate, keep=True), linear.linear_multiply, dtype)
    for name, *three in zip(("output", "derivative", "product"), found, peer, exact, strict=True):
        assert_by_rule(*three, 2, name)


@pytest.mark.parametrize("form", ["library", "fused"])
def test_more_rows_and_columns_than_a_tile(form):
    x = torch.randn(150, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = _weights(96, 200, 36, False, True)
    exact = _run(mlp.mlp_reference, x, weights, torch.float64, "gelu", False)
    peer = _run(mlp.mlp_reference, x, weights, torch.float32, "gelu", False)
    actual = _run(mlp.mlp, x, weights, torch.float32, "gelu", False, form)
    assert_by_rule(actual[0], peer[0], exact[0], 2)
    assert_by_rule(actual[1], peer[1], exact[1], 3)


def _exact(x, activation):
    """Activation and derivative of a float64 tensor; PyTorch's own lose the small values far below zero."""
    if activation == "gelu":
        below = torch.special.erfc(-x / math.sqrt(2)) / 2  # Φ, with all digits in its tail as well
        return x * below, below + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    u, du = x, 1.0
    if activation == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2u)
        u, du = (2 * math.sqrt(2 / math.pi) * v for v in (x + 0.044715 * x**3, 1 + 3 * 0.044715 * x**2))
    return x * u.sigmoid(), u.sigmoid() + x * u.sigmoid() * (-u).sigmoid() * du


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_every_number_of_sixteen_bits(activation, dtype):
    """All x of float16's range: activation and derivative are the exact results rounded, or nearly so.

    What the kernels approximate is good to 4e-5 of Φ and of 1 - Φ, so of the terms of the derivative, whose sum has a
    zero near -0.75. Triton's interpreter does not round to bfloat16, it cuts off: a unit for the half that rounding
    costs. Beyond the range of float32 an exponential is infinite, and its inverse 0.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() <= torch.finfo(torch.float16).max]
    out, slope = (torch.full_like(x, float("nan"), device=DEVICE) for _ in range(2))
    activations.launch_activate(x.to(DEVICE), out, activation, False)
    activations.launch_activate(x.to(DEVICE), slope, activation, False, dout=torch.ones_like(out))
    rounding = 1.0 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.5
    exact = _exact(x.double(), activation)
    terms = exact[0].abs(), exact[1].abs() + (exact[0] / x.double()).abs().nan_to_num()
    for found, expected, size in zip((out, slope), exact, terms, strict=True):
        smallest = torch.finfo(dtype).smallest_normal
        unit = torch.finfo(dtype).eps * expected.abs().clamp_min(smallest).log2().floor().exp2()
        error = (found.cpu().double() - expected).abs()
        assert (error <= rounding * unit + 4e-5 * size + 1e-36).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "relu"])
def test_far_from_zero(activation, dtype):
    """Activations at ±30 and ±1e4: finite, with slope 0 or 1."""
    x = torch.tensor([[-1e4, -30.0, 30.0, 1e4]], dtype=dtype)
    eye = torch.eye(4)
    out, slope = _run(mlp.mlp, x.double(), (eye, None, eye, None), dtype, activation, False, "library")
    out = out.float()
    torch.testing.assert_close(out.cpu(), torch.tensor([[0.0, 0.0, 30.0, 1e4]]), rtol=1e-6, atol=1e-6)
    assert slope.isfinite().all()


def test_nothing_is_kept_without_a_gradient():
    x, eye = torch.randn(3, 4, device=DEVICE), torch.eye(4, device=DEVICE)
    for fused in {False, linear.available(x, 4)}:
        kept = torch.ops.hgprompt.mlp(x, eye, None, eye, None, "gelu", False, fused, False)[1]
        assert kept.numel() == 0


def test_operator_is_well_behaved():
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    w1, w2, bias = torch.randn(16, 8, device=DEVICE), torch.randn(8, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    for fused in {False, linear.available(x, 8, 16)}:
        torch.library.opcheck(torch.ops.hgprompt.mlp.default, (x, w1, bias, w2, None, "gelu", False, fused, True))


@pytest.mark.parametrize("form", ["library", "fused"])
def test_the_backward_writes_no_zeros(form):
    """Unless told not to, autograd makes zeros of the size of what the forward pass keeps: it is an output, too."""
    x = torch.randn(6, 16, device=DEVICE, requires_grad=True)
    w1, b1, w2, b2 = (w.to(DEVICE, torch.float32) for w in _weights(16, 32, 16, False, True))
    out = mlp.mlp(x, w1, b1, w2, b2, "gelu", False, form)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        torch.autograd.grad(out, x, torch.ones_like(out))
    assert [6, 32] not in [shape for e in profile.events() if "zero" in e.name for shape in e.input_shapes]
