"""The mini backbone and backbones by name."""

from __future__ import annotations

import pytest
import torch

import hgprompt
from hgprompt import BackboneError, FrozenViT, PromptPool, fast_ensemble, load_backbone
from hgprompt.bundled import fast_dtype, mini_model
from hgprompt.data import render_task


def test_mini_is_its_timm_model():
    vit = load_backbone("mini", device="cpu")
    assert (vit.name, vit.width, vit.depth, vit.image_size, vit.patch_size) == ("mini", 192, 8, (64, 64), (8, 8))
    images = render_task("azimuth", 4).images
    model = mini_model()
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vit.mean, vit.std))
        expected = model.forward_head(model.forward_features((images / 255 - mean) / std), pre_logits=True)
    # Two orders of the same float32 sums through 8 blocks.
    torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-4)


def test_mini_is_small_and_its_weights_are_not_the_random_ones():
    from importlib import resources

    size = len((resources.files("hgprompt") / "weights" / "mini.safetensors").read_bytes())
    assert size <= 8 * 2**20
    trained, random = (load_backbone("mini", device="cpu").fingerprint, FrozenViT(mini_model(pretrained=False)))
    assert trained != random.fingerprint
    assert trained == load_backbone("mini", device="cpu", dtype=torch.bfloat16).fingerprint


def test_mini_at_another_size():
    vit = load_backbone("mini", device="cpu", img_size=96)
    assert vit.image_size == (96, 96)
    assert vit(torch.zeros(1, 3, 96, 96)).isfinite().all()
    # Prompts carry no position: one network at two sizes is one backbone.
    assert vit.fingerprint == load_backbone("mini", device="cpu").fingerprint


def test_a_pool_that_names_mini_finds_it():
    vit = load_backbone("mini", device="cpu")
    g = torch.Generator().manual_seed(0)
    pool = PromptPool(torch.randn(2, 3, 192, generator=g), backbone=vit.info)
    result = fast_ensemble(pool, render_task("elevation", 40).batches(16), gradient_images=0, lam=0.0, device="cpu")
    assert result.backbone == vit.info


def test_names():
    assert load_backbone("vit_tiny_patch16_224", device="cpu", img_size=32, pretrained=False).depth == 12
    with pytest.raises(BackboneError, match="no model"):
        load_backbone("vit_minuscule")
    for wrong in (0, "64", (64,), [64, 60], 64.0):
        with pytest.raises(BackboneError, match="one or two multiples"):
            load_backbone("mini", img_size=wrong)
    assert load_backbone("mini", img_size=[32, 64]).image_size == (32, 64)  # as JSON has it
    with pytest.raises(BackboneError, match="img_size, and nothing else"):
        load_backbone("mini", depth=3)
    assert hgprompt.load_backbone is load_backbone


def test_making_it_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    load_backbone("mini", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_fast_dtype_follows_the_processor(monkeypatch):
    for capabilities, expected in (
        ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert fast_dtype("cpu") is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_dtype("cpu") is torch.float32
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert fast_dtype("cuda") is expected
