"""Attention's kernels against plain PyTorch in float64: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from rule import assert_by_rule, error

pytest.importorskip("triton")
from hgprompt.kernels import attention, compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 products are wrong, upstream; a GPU has them all.
LOW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _run(function, tensors, dtype, shared=None):
    """Output and gradients of every tensor that is not shared; shared(tensors) makes the arguments."""
    leaves = [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    arguments = leaves if shared is None else shared(leaves)
    out = function(*arguments)
    slope = torch.linspace(-3, 3, out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    known = [t for t in leaves if t is not None]
    return out.detach(), *torch.autograd.grad((out * slope).sum(), known)


def _compare(function, reference, tensors, dtype, shared=None):
    exact = _run(reference, tensors, torch.float64, shared)
    peer = _run(reference, tensors, dtype, shared)
    actual = _run(function, tensors, dtype, shared)
    assert len(actual) == len(exact)
    for i, (a, p, e) in enumerate(zip(actual, peer, exact, strict=True)):
        assert a.shape == e.shape
        # 2 times PyTorch's own error for the output, 3 times for gradients.
        assert_by_rule(a, p, e, 2 if i == 0 else 3, "output" if i == 0 else f"gradient {i}")


def _packed(qkv, k2=None, v2=None):
    return attention.packed_attention(qkv, qkv.shape[-1] ** -0.5, k2, v2)


def _packed_reference(qkv, k2=None, v2=None):
    return attention.packed_attention_reference(qkv, qkv.shape[-1] ** -0.5, k2, v2)


def _segments(q1, k1, v1, q2=None, k2=None, v2=None):
    return attention.segment_attention(q1, k1, v1, q1.shape[-1] ** -0.5, q2, k2, v2)


def _segments_reference(q1, k1, v1, q2=None, k2=None, v2=None):
    return attention.segment_attention_reference(q1, k1, v1, q1.shape[-1] ** -0.5, q2, k2, v2)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(
    ("m", "b", "t", "heads", "width"),
    [(1, 1, 17, 2, 64), (2, 2, 17, 1, 32), (1, 1, 197, 1, 64), (1, 1, 247, 1, 80), (1, 1, 261, 1, 64),
     (1, 1, 577, 1, 32), (1, 2, 1, 1, 16), (1, 1, 64, 1, 128)],
)  # fmt: skip
def test_middle_blocks(m, b, t, heads, width, dtype):
    _compare(_packed, _packed_reference, [_draw(m, b, t, 3, heads, width)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(
    ("m", "b", "s", "p", "heads", "width"),
    [(2, 2, 17, 5, 2, 32), (1, 1, 197, 50, 1, 64), (3, 1, 17, 1, 1, 80), (1, 2, 17, 0, 1, 64), (1, 2, 37, 50, 1, 32)],
)  # fmt: skip
def test_first_block(m, b, s, p, heads, width, dtype):
    """Image tokens shared by the prompts, prompt tokens by the images; gradients of the prompts' alone."""
    images = [_draw(b, s, heads, width, seed=i) for i in range(3)]
    prompts = [_draw(m, p, heads, width, seed=i + 3) for i in range(3)]

    def shared(leaves):
        first = [x.to(leaves[0].device, leaves[0].dtype).expand(m, *x.shape) for x in images]
        return *first, *(x[:, None].expand(m, b, *x.shape[1:]) for x in leaves)

    if p:
        _compare(_segments, _segments_reference, prompts, dtype, shared)
    else:
        arguments = shared([x.to(DEVICE, dtype) for x in prompts])
        exact = _segments_reference(*(a.double() for a in arguments))
        assert_by_rule(_segments(*arguments), _segments_reference(*arguments), exact, 2)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(("s", "p", "width"), [(17, 5, 64), (197, 50, 64), (17, 1, 32), (40, 50, 80)])
@pytest.mark.parametrize("first", [False, True], ids=["middle", "first"])
def test_deep_prompts_are_keys_and_values(first, s, p, width, dtype):
    m, b, heads = 2, 1, 1
    keys, values = _draw(m, p, heads, width), _draw(m, p, heads, width, seed=1)
    if first:
        images = [_draw(b, s, heads, width, seed=i) for i in range(3)]

        def shared(leaves):
            tokens = [x.to(leaves[0].device, leaves[0].dtype).expand(m, *x.shape) for x in images]
            return *tokens, None, *(x[:, None].expand(m, b, *x.shape[1:]) for x in leaves)

        _compare(_segments, _segments_reference, [keys, values], dtype, shared)
    else:

        def packed(leaves):
            return leaves[0], *(x[:, None].expand(m, b, *x.shape[1:]) for x in leaves[1:])

        _compare(_packed, _packed_reference, [_draw(m, b, s, 3, heads, width), keys, values], dtype, packed)


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize(("t", "s", "p"), [(1, 247, 0), (1, 197, 50), (5, 17, 0)])
def test_last_block_has_few_queries(t, s, p, dtype):
    tensors = [_draw(1, 2, t, 1, 64), _draw(1, 2, s, 1, 64, seed=1), _draw(1, 2, s, 1, 64, seed=2)]
    if p:
        tensors += [None, _draw(1, 2, p, 1, 64, seed=3), _draw(1, 2, p, 1, 64, seed=4)]
    _compare(_segments, _segments_reference, tensors, dtype)


def test_one_program_for_all_keys_gives_the_same(monkeypatch):
    """WHOLE: dQ, dK, dV from one program, where a tile holds all keys. No shipped configuration uses it yet."""
    table = {a: {k: [dict(r) for r in rows] for k, rows in t.items()} for a, t in compiler.configurations().items()}
    for kernels in table.values():
        for row in kernels["attention_backward_keys"]:
            row["WHOLE_UP_TO"] = 256
    tensors = [_draw(2, 1, 30, 3, 1, 32), _draw(2, 1, 7, 1, 32, seed=1), _draw(2, 1, 7, 1, 32, seed=2)]
    split = _run(_packed, tensors, torch.float32)
    monkeypatch.setattr(compiler, "configurations", lambda: table)
    compiler._row.cache_clear()
    try:
        whole = _run(_packed, tensors, torch.float32)
    finally:
        compiler._row.cache_clear()
    exact = _run(_packed_reference, tensors, torch.float64)
    for a, b, e in zip(whole, split, exact, strict=True):
        assert error(a, e) < 2e-6  # three TF32 products keep about 21 bits
        assert error(b, e) < 2e-6


def test_large_scores_do_not_overflow():
    """Scores of ±1e4: the softmax is a maximum; exp of anything that is not shifted would be infinite."""
    qkv = _draw(1, 1, 20, 3, 1, 32)
    qkv[:, :, :, :2] *= 100
    out = _packed(qkv.to(DEVICE, torch.float32))
    # Ties apart, the output is the value of one key; two float32 roundings of 1e4 move a weight by 1e-3 at most.
    torch.testing.assert_close(out.cpu().double(), _packed_reference(qkv), rtol=0, atol=1e-2)


def test_tensors_that_lie_otherwise_are_copied():
    """Heads apart, a row off 16 bytes, keys and values of different strides: the same numbers."""
    q, k, v = (_draw(1, 2, 9, 2, 16, seed=i).to(DEVICE, torch.float32) for i in range(3))
    expected = _segments(q, k, v)
    apart = q.transpose(2, 3).contiguous().transpose(2, 3)
    storage = torch.zeros(k.numel() + 1, device=DEVICE)
    storage[1:] = k.flatten()
    shifted = storage[1:].view(k.shape)
    strided = torch.stack([v, v], dim=2)[:, :, 0]
    assert torch.equal(_segments(apart, shifted, strided), expected)


def test_the_same_bits_every_time():
    qkv = _draw(2, 2, 40, 3, 2, 32)
    first, second = (_run(_packed, [qkv], torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["first segment", "second segment"])
def test_only_what_is_needed_has_a_gradient(needed):
    leaves = [_draw(1, 1, n, 1, 32, seed=i).to(DEVICE, torch.float32) for i, n in enumerate((9, 9, 9, 4, 4, 4))]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(needed[i // 3])
    out = _segments(*leaves)
    out.square().sum().backward()
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    _segments_reference(*exact).square().sum().backward()
    for mine, other in zip(leaves, exact, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            assert error(mine.grad, other.grad) < 5e-6  # three TF32 products, twice


def test_operators_are_well_behaved():
    """Schemas, fake tensors, autograd registration and tracing, as torch.compile and others rely on them."""
    qkv = torch.randn(2, 2, 6, 3, 1, 16, device=DEVICE, requires_grad=True)
    extra = [torch.randn(2, 2, 3, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.hgprompt.packed_attention.default, (qkv, None, None, 0.25))
    torch.library.opcheck(torch.ops.hgprompt.packed_attention.default, (qkv, *extra[:2], 0.25))
    q1, k1, v1 = (t.detach().clone().requires_grad_() for t in qkv.unbind(3))
    torch.library.opcheck(torch.ops.hgprompt.segment_attention.default, (q1, k1, v1, *extra, 0.25))


@pytest.mark.parametrize(
    ("width", "dtype", "good"),
    [(64, torch.bfloat16, True), (80, torch.float16, True), (20, torch.bfloat16, False), (256, torch.float16, False),
     (64, torch.float64, False)],
)  # fmt: skip
def test_supported(width, dtype, good):
    assert attention.supported(width, dtype) is good
