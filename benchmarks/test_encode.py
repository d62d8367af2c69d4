"""(b) images × prompts through the network, beside a loop over prompts with timm's own modules.

The loop is the honest one: timm's model in the same dtype, its fused attention, frozen weights without gradients,
the same images at the same batch size, the same features and gradients in the end (checked).
"""

from __future__ import annotations

import literal
import pytest
import timm
import torch

from hgprompt import FrozenViT, encode
from hgprompt.encoder import pull_back

M, B = 2, 8
CASES = [(224, 50), (112, 10)]


def _setup(size, tokens, dtype, deep):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0, img_size=size)
        model = model.eval().requires_grad_(False).to(dtype)
        prompts = torch.randn((M, 12, tokens, 768) if deep else (M, tokens, 768), dtype=dtype)
        images = torch.randn(B if size == 224 else 4 * B, 3, size, size, dtype=dtype)
        direction = torch.randn(len(images), 768, dtype=dtype)
    return model, FrozenViT.from_timm(model), prompts, images, direction


def _relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize(("size", "tokens"), CASES, ids=["224px-p50", "112px-p10"])
@torch.no_grad()
def test_forward(paired, benchmark, size, tokens, deep, dtype):
    model, vit, prompts, images, _ = _setup(size, tokens, dtype, deep)
    assert (
        _relative(encode(vit, prompts, images), literal.features(model, prompts, images)) < 200 * torch.finfo(dtype).eps
    )
    benchmark.group = "forward"
    paired(lambda: encode(vit, prompts, images), lambda: literal.features(model, prompts, images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize(("size", "tokens"), CASES, ids=["224px-p50", "112px-p10"])
def test_forward_backward(paired, benchmark, size, tokens, deep, dtype):
    model, vit, prompts, images, direction = _setup(size, tokens, dtype, deep)

    def theirs():
        gradients = []
        for prompt in prompts:
            leaf = prompt[None].clone().requires_grad_()
            loss = (literal.features(model, leaf, images) * direction).sum()
            gradients.append(torch.autograd.grad(loss, leaf)[0])
        return torch.cat(gradients)

    def ours():
        return pull_back(vit, prompts, images, lambda f, m, b: (f * direction[b]).sum((1, 2)))[2]

    assert _relative(ours(), theirs()) < 200 * torch.finfo(dtype).eps
    benchmark.group = "forward and backward"
    paired(ours, theirs)
