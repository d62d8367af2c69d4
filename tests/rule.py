"""How a kernel is judged: by the error that PyTorch itself makes in the same precision, not by taste."""

from __future__ import annotations

import torch


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN (an output that was not written) stays NaN."""
    exact = exact.detach().double().cpu()
    return float((actual.detach().double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_by_rule(actual, peer, exact, factor: float, name: str = "") -> None:
    """Error against float64 at most `factor` times the peer's in the same precision, plus a rounding floor.

    The floor is for cases in which the peer happens to round luckily (one row, one key): 2 units of the last place, and
    in float32 the 2^-20 or so that three TF32 products leave.
    """
    floor = 2 * torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 2e-6
    mine, other = error(actual, exact), error(peer, exact)
    assert mine <= factor * other + floor, f"{name}: error {mine:.2e}, PyTorch's own {other:.2e}"
