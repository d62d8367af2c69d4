"""Operator: eager calls go straight to the function, and everybody who watches operators sees one."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hgprompt.kernels import attention, mlp, norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.hgprompt


def _random(*shape):
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape)))


def _norm():
    return _random(2, 3, 16), None, _random(3, 16).expand(2, 3, 16), True, 1e-6, torch.float32


def _mlp():
    return _random(5, 16), _random(32, 16), None, _random(16, 32), None, "gelu", False, False, True


def _packed():
    return _random(2, 1, 5, 3, 2, 16), None, None, 0.25


def _segments():
    (q, k, v), (k2, v2) = (_random(2, 1, rows, 2, 16) for rows in (4, 5, 5)), (_random(2, 1, 3, 2, 16),) * 2
    return q, k, v, None, k2, v2, 0.25


CASES = {
    "add_normalize": (norm._op, _norm), "mlp": (mlp._op, _mlp), "packed_attention": (attention._packed_op, _packed),
    "segment_attention": (attention._segment_op, _segments),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_eager_call_gives_the_operators_bits_without_its_way(name, monkeypatch):
    operator, make = CASES[name]
    inputs = make()
    leaves = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)][: 1 if name == "mlp" else None]

    def outputs_and_gradients(call, wanted):
        own = [
            x.detach().requires_grad_(i in wanted) if isinstance(x, torch.Tensor) else x for i, x in enumerate(inputs)
        ]
        outputs = call(*own)
        if not wanted:
            return [x.detach() for x in outputs], []
        which = 2 if name == "add_normalize" else 0
        found = torch.autograd.grad(outputs[which].square().sum(), [own[i] for i in wanted])
        return [x.detach() for x in outputs], list(found)

    for wanted in ([], leaves[:1], leaves[-1:], leaves):
        expected = outputs_and_gradients(getattr(OPS, name), wanted)
        with monkeypatch.context() as context:
            context.setattr(operator, "_op", lambda *_: pytest.fail("went through the dispatcher"))
            found = outputs_and_gradients(operator, wanted)
        for mine, theirs in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_who_watches_operators_sees_one(name):
    operator, make = CASES[name]
    inputs = make()
    with Watching() as watching:
        operator(*inputs)
    assert f"hgprompt.{name}.default" in watching.seen
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]

    def of_tensors(*given):
        rest = iter(given)
        return operator(*(next(rest) if isinstance(x, torch.Tensor) else x for x in inputs))

    graph = make_fx(of_tensors)(*tensors)
    assert f"hgprompt.{name}.default" in {str(node.target) for node in graph.graph.nodes}
    assert f"hgprompt::{name}" in str(torch.jit.trace(of_tensors, tuple(tensors)).graph)
    mode = FakeTensorMode()
    fakes = of_tensors(*(mode.from_tensor(x) for x in tensors))  # outside of the mode: the tensors are what tells
    assert [x.shape for x in fakes] == [x.shape for x in operator(*inputs)]


def test_differentiable_once():
    x = _random(5, 16).requires_grad_()
    _, z = norm.add_normalize(norm.Stream(x), None, "layer", 1e-6, torch.float32)
    (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
