"""The network on the kernels against the network in plain PyTorch, and the choice between them."""

from __future__ import annotations

import itertools
import subprocess
import sys

import literal
import pytest
import torch
from rule import assert_by_rule

from hgprompt import network, operations
from hgprompt.backbone import FrozenViT
from hgprompt.encoder import MicroBatch, MultiPromptEncoder, encode, pull_back
from hgprompt.errors import OptionError

pytest.importorskip("triton")
from hgprompt.kernels import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
VARIANTS = [
    {},
    {"depth": 1},
    {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"global_pool": "avg", "reg_tokens": 1},
    {"pre_norm": True, "init_values": 0.3},
    {"class_token": False, "global_pool": "map"},
]


def _inputs(vit, deep, m=2, b=2, p=3):
    generator = torch.Generator().manual_seed(2)
    shape = (m, vit.depth, p, vit.width) if deep else (m, p, vit.width)
    images = torch.randn(b, 3, *vit.image_size, dtype=torch.float64, generator=generator)
    return torch.randn(shape, dtype=torch.float64, generator=generator), images


def _both(vit, prompts, images, impl):
    """Features and gradients of a loss that weighs them."""
    b = images.shape[-4]
    slope = torch.linspace(-2, 2, prompts.shape[0] * b * vit.width, dtype=torch.float64).sin()
    slope = slope.view(len(prompts), b, vit.width).to(vit.device)
    features, _, gradients = pull_back(
        vit, prompts.to(vit.dtype), images.to(vit.dtype), lambda f, m, b: (f * slope[m, b]).sum((1, 2)), impl=impl
    )
    return features, gradients.to(vit.dtype)


# Interpreted, a network takes seconds: there, all pairs of the first variant, and of the others one dtype of each kind.
CASES = [
    (options, deep, dtype)
    for options, deep, dtype in itertools.product(VARIANTS, (False, True), (torch.float32, *LOW))
    if DEVICE == "cuda" or not options or deep == (dtype == torch.float32)
]


@pytest.mark.parametrize(("options", "deep", "dtype"), CASES, ids=str)
def test_triton_equals_reference(options, deep, dtype):
    model = literal.tiny_vit(**options).double()
    exact_vit, vit = (FrozenViT.from_timm(model, dtype=d, device=DEVICE) for d in (torch.float64, dtype))
    prompts, images = _inputs(vit, deep)
    exact = _both(exact_vit, prompts, images, "reference")
    peer, actual = (_both(vit, prompts, images, impl) for impl in ("reference", "triton"))
    # A whole network: both round at the same places, in another order. 2 times the peer's error, 3 for gradients.
    assert_by_rule(actual[0], peer[0], exact[0], 2, "features")
    assert_by_rule(actual[1], peer[1], exact[1], 3, "gradients")


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_triton_equals_reference_with_images_of_each_prompt(deep):
    model = literal.tiny_vit(depth=2).double()
    exact_vit, vit = (FrozenViT.from_timm(model, dtype=d, device=DEVICE) for d in (torch.float64, torch.float32))
    prompts, images = _inputs(vit, deep, b=4)
    for own in (images.view(2, 2, *images.shape[1:]), images[:2, None]):
        exact = _both(exact_vit, prompts, own, "reference")
        peer, actual = (_both(vit, prompts, own, impl) for impl in ("reference", "triton"))
        # As above.
        assert_by_rule(actual[0], peer[0], exact[0], 2, "features")
        assert_by_rule(actual[1], peer[1], exact[1], 3, "gradients")


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_kernels_with_pytorchs_attention(deep):
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE)
    prompts, images = _inputs(vit, deep)
    for a, b in zip(*(_both(vit, prompts, images, impl) for impl in ("sdpa", "reference")), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 rounding over the blocks


@pytest.mark.parametrize("options", [{}, {"depth": 1}, {"pre_norm": True, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_bfloat16s_stream_of_two_tensors(options, deep):
    """bfloat16's norms and activations in a whole network; the interpreter can run them, and no products."""
    model = literal.tiny_vit(**options).double()
    exact_vit, vit = (FrozenViT.from_timm(model, dtype=d, device=DEVICE) for d in (torch.float64, torch.bfloat16))
    prompts, images = _inputs(vit, deep)
    exact = _both(exact_vit, prompts, images, "reference")
    peer, actual = (_both(vit, prompts, images, impl) for impl in ("reference", "sdpa"))
    # As above; the peer's stream and its gradient are float32.
    assert_by_rule(actual[0], peer[0], exact[0], 2, "features")
    assert_by_rule(actual[1], peer[1], exact[1], 3, "gradients")


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_attention_reads_what_it_is_given(monkeypatch, options, deep):
    """Nothing is copied on the way into a kernel, least of all what images or prompts share."""
    readable, copied = attention._readable, []

    def watched(*tensors):
        found = readable(*tensors)
        pairs = zip(tensors, found if len(tensors) > 1 else (found,), strict=True)
        copied.extend(tuple(x.shape) for x, y in pairs if x is not y)
        return found

    monkeypatch.setattr(attention, "_readable", watched)
    vit = FrozenViT.from_timm(literal.tiny_vit(**options), device=DEVICE)
    _both(vit, *_inputs(vit, deep), "triton")
    assert copied == []


def test_another_attention_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE)
    with pytest.raises(OptionError, match=r"pip install 'hgprompt\[xformers\]'"):
        encode(vit, *_inputs(vit, False), impl="xformers")


def test_autocast_of_the_caller_changes_nothing():
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE)
    prompts, images = _inputs(vit, False)
    expected = _both(vit, prompts, images, "triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = _both(vit, prompts, images, "triton")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("p", [0, 1])
def test_few_prompt_tokens(p):
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE)
    prompts, images = _inputs(vit, False, p=p)
    a, b = (encode(vit, prompts, images.float(), impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_module_finds_its_micro_batch_once(monkeypatch):
    vit, asked = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE), []
    monkeypatch.setattr(MicroBatch, "_find", staticmethod(lambda *_, **__: asked.append(None) or 8))
    prompts, images = _inputs(vit, False)
    for module in (MultiPromptEncoder(vit, prompts), vit):
        asked.clear()
        with torch.no_grad():
            for _ in range(3):
                module(images)
        assert len(asked) == 1
    with pytest.raises(OptionError, match="micro_batch"):
        MultiPromptEncoder(vit, prompts, micro_batch=0)


@pytest.mark.parametrize("micro_batch", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_the_encoder_is_one_graph_for_the_compiler(micro_batch, dtype):
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE)
    prompts, images = _inputs(vit, False)
    encoder = MultiPromptEncoder(vit, prompts, micro_batch=micro_batch)
    images = images.to(DEVICE, dtype)
    found = torch.compile(encoder, fullgraph=True, backend="aot_eager")(images)
    expected = encoder(images)
    slopes = [torch.autograd.grad(f.square().sum(), encoder.prompts)[0] for f in (found, expected)]
    # Both in float32; the compiler takes some operations apart, which moves the last digits.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("impl", "dtype"), [("triton", torch.float32), ("sdpa", torch.bfloat16)], ids=str)
def test_one_graph_for_the_compiler(impl, dtype):
    """torch.compile traces the network with its kernels without a break, forward and backward; in bfloat16 with its
    stream of two tensors (and PyTorch's attention, since the interpreter has no products of bfloat16)."""
    vit = FrozenViT.from_timm(literal.tiny_vit(), device=DEVICE, dtype=dtype)
    prompts, images = _inputs(vit, False)
    ops = operations.select(vit, impl)
    tokens = network.embed(vit, images.to(DEVICE, dtype), ops)

    def run(prompts):
        return network.features(vit, tokens, prompts, ops).square().sum()

    leaf = prompts.to(DEVICE, dtype).requires_grad_()
    expected = torch.autograd.grad(run(leaf), leaf)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(leaf), leaf)[0]
    # The compiler takes sums of gradients apart, which moves last digits: in bfloat16 2^-8 of the largest summed.
    torch.testing.assert_close(found, expected, **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2**-7}))


def test_the_choice():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    assert operations.select(vit, "auto") is operations.REFERENCE  # a CPU, whatever the interpreter could do
    assert operations.select(vit, "reference") is operations.REFERENCE
    with pytest.raises(OptionError, match="impl must be"):
        operations.select(vit, "cuda")
    with pytest.raises(OptionError, match=r"float16, bfloat16 or float32|sm_80"):
        operations.select(vit.double(), "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="has a GPU")
def test_kernels_without_a_gpu_are_refused():
    program = """
import sys; sys.path.insert(0, "tests")
import literal
from hgprompt import FrozenViT, HGPromptError, operations
vit = FrozenViT.from_timm(literal.tiny_vit())
assert operations.select(vit, "auto") is operations.REFERENCE
try:
    operations.select(vit, "triton")
except HGPromptError as error:
    assert "sm_80" in str(error) and "cpu" in str(error) and "reference" in str(error), error
else:
    raise AssertionError("not refused")
"""
    environment = {"TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
