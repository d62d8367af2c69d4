"""encode against the literal loop over prompts with timm's own modules."""

from __future__ import annotations

import literal
import pytest
import torch

from hgprompt.backbone import FrozenViT
from hgprompt.encoder import MultiPromptEncoder, encode, pull_back
from hgprompt.errors import BackboneError, DataError, OptionError, PromptError

VARIANTS = [
    {},
    {"depth": 1},
    {"reg_tokens": 2, "no_embed_class": True},
    {"pre_norm": True},
    {"qk_norm": True, "scale_attn_norm": True},
    {"global_pool": "avg"},
    {"class_token": False, "global_pool": "map"},
    {"init_values": 0.3, "depth": 2},
]


def _inputs(m=3, b=4, p=5, depth=None, dtype=torch.float64, width=16, size=16):
    generator = torch.Generator().manual_seed(3)
    shape = (m, p, width) if depth is None else (m, depth, p, width)
    prompts = torch.randn(shape, dtype=dtype, generator=generator)
    return prompts, torch.randn(b, 3, size, size, dtype=dtype, generator=generator)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_literal_in_float64(options, deep):
    model = literal.tiny_vit(**options).double()
    vit = FrozenViT.from_timm(model)
    prompts, images = _inputs(depth=vit.depth if deep else None)
    with torch.no_grad():
        torch.testing.assert_close(
            encode(vit, prompts, images), literal.features(model, prompts, images), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_equals_literal_in_float32_on_a_real_architecture(deep):
    model = literal.named_vit("vit_small_patch16_224", img_size=64, depth=4)
    vit = FrozenViT.from_timm(model)
    prompts, images = _inputs(m=2, p=7, depth=4 if deep else None, dtype=torch.float32, width=384, size=64)
    with torch.no_grad():
        expected = literal.features(model, prompts, images)
        actual = encode(vit, prompts, images)
    assert (actual - expected).norm() / expected.norm() < 1e-5  # float32 rounding over four blocks


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize(
    "options", [{}, {"pre_norm": True, "reg_tokens": 1, "qk_norm": True}, {"global_pool": "avg"}], ids=str
)
def test_gradients_of_the_prompts(options, deep):
    model = literal.tiny_vit(depth=2, **options).double()
    vit = FrozenViT.from_timm(model)
    prompts, images = _inputs(m=2, b=2, p=3, depth=2 if deep else None)
    prompts.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: encode(vit, p, images), (prompts,), fast_mode=True)
    # More pairs than one micro-batch: recomputed in the backward pass, same result.
    weights = torch.randn(2, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad((literal.features(model, prompts, images) * weights).sum(), prompts)
    for micro_batch in (1, 2, 4):
        (actual,) = torch.autograd.grad(
            (encode(vit, prompts, images, micro_batch=micro_batch) * weights).sum(), prompts
        )
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 7, 100])
def test_micro_batches_do_not_matter(micro_batch):
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    prompts, images = _inputs(m=3, b=5)
    torch.testing.assert_close(
        encode(vit, prompts, images, micro_batch=micro_batch),
        encode(vit, prompts, images),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_pull_back_equals_autograd_through_encode(micro_batch):
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    prompts, images = _inputs(m=3, b=4)
    weights = torch.randn(3, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features, losses, gradients = pull_back(
        vit, prompts, images, lambda f, m, b: (f * weights[m, b]).sum((1, 2)), micro_batch=micro_batch
    )
    prompts.requires_grad_()
    expected = encode(vit, prompts, images)
    torch.testing.assert_close(features, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses, (expected * weights).sum((1, 2)).detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), prompts)
    torch.testing.assert_close(gradients, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 5, None])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"pre_norm": True, "reg_tokens": 1, "qk_norm": True}, {"global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
    ],
    ids=str,
)  # fmt: skip
def test_images_of_each_prompt_equal_a_loop_over_prompts(options, deep, micro_batch):
    vit = FrozenViT.from_timm(literal.tiny_vit(**options).double())
    prompts, _ = _inputs(m=3, depth=vit.depth if deep else None)
    for b in (1, 4):
        g = torch.Generator().manual_seed(b)
        images = torch.randn(3, b, 3, 16, 16, dtype=torch.float64, generator=g)
        weights = torch.randn(3, b, 16, dtype=torch.float64, generator=g)
        leaf = prompts.clone().requires_grad_()
        expected = torch.cat([encode(vit, leaf[i : i + 1], images[i]) for i in range(3)])
        (slope,) = torch.autograd.grad((expected * weights).sum(), leaf)
        actual = encode(vit, leaf, images, micro_batch=micro_batch)
        # The same sums in another blocking, in float64.
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        (found,) = torch.autograd.grad((actual * weights).sum(), leaf)
        torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-12)
        features, losses, gradients = pull_back(
            vit, prompts, images, lambda f, m, b, w=weights: (f * w[m, b]).sum((1, 2)), micro_batch=micro_batch
        )
        torch.testing.assert_close(features, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses, (expected * weights).sum((1, 2)).detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, slope, rtol=1e-12, atol=1e-12)


def test_images_of_each_prompt_are_as_many_as_prompts():
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    prompts, images = _inputs(m=3)
    with pytest.raises(DataError, match="are of 2 prompts, there are 3"):
        encode(vit, prompts, images.expand(2, *images.shape))
    with pytest.raises(DataError, match="images must be"):
        pull_back(vit, prompts, images.expand(3, *images.shape)[..., :8], lambda f, m, b: f.sum((1, 2)))
    assert encode(vit, prompts, images[:0].expand(3, 0, 3, 16, 16)).shape == (3, 0, 16)


def test_uint8_images_of_each_prompt():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    prompts, _ = _inputs(m=2, dtype=torch.float32)
    images = torch.randint(0, 256, (2, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([encode(vit, prompts[i : i + 1], images[i]) for i in range(2)])
    torch.testing.assert_close(encode(vit, prompts, images), expected, rtol=1e-5, atol=1e-5)  # float32, other blocking


def test_order_of_prompt_tokens_does_not_matter():
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    prompts, images = _inputs()
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(encode(vit, prompts[:, order], images), encode(vit, prompts, images))


def test_no_prompt_tokens_is_the_plain_network():
    model = literal.tiny_vit().double()
    prompts, images = _inputs(p=0)
    with torch.no_grad():
        torch.testing.assert_close(encode(FrozenViT.from_timm(model), prompts, images)[2], model(images))


def test_bfloat16_is_as_good_as_timm():
    model = literal.named_vit("vit_small_patch16_224", img_size=64, depth=4)
    prompts, images = _inputs(m=2, p=7, dtype=torch.float32, width=384, size=64)
    vit = FrozenViT.from_timm(model, dtype=torch.bfloat16)  # of float32's weights, as timm's are rounded from them
    with torch.no_grad():
        exact = literal.features(model.double(), prompts.double(), images.double())
        low = literal.features(model.bfloat16(), prompts.bfloat16(), images.bfloat16()).double()
        ours = encode(vit, prompts, images)
    assert ours.dtype == torch.bfloat16
    # The residual stream is float32 here: 0.86 to 0.97 times timm's error in twelve draws of weights and images.
    assert (ours.double() - exact).norm() <= (low - exact).norm()


def test_autocast_and_grad_mode_of_the_caller():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    prompts, images = _inputs(dtype=torch.float32)
    plain = encode(vit, prompts, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode(vit, prompts, images), plain)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        inside = pull_back(vit, *_inputs(dtype=torch.float32), lambda f, m, b: f.sum((1, 2)))[2]
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside, pull_back(vit, prompts, images, lambda f, m, b: f.sum((1, 2)))[2])
    prompts.requires_grad_()
    with torch.no_grad():
        assert not encode(vit, prompts, images).requires_grad


def test_module_trains_its_prompts_and_nothing_else():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    prompts, images = _inputs(dtype=torch.float32)
    module = MultiPromptEncoder(vit, prompts)
    assert [n for n, _ in module.named_parameters()] == ["prompts"]
    assert list(module.state_dict()) == ["prompts"]
    module(images).square().sum().backward()
    assert module.prompts.grad.abs().sum() > 0
    torch.testing.assert_close(module(images), encode(vit, prompts, images))
    assert MultiPromptEncoder(vit)(images, prompts).shape == (3, 4, 16)
    with pytest.raises(PromptError, match="without prompts"):
        MultiPromptEncoder(vit)(images)
    assert module.double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.zeros(2, 16), r"\[M, p, d\]"),
        (torch.zeros(2, 3, 16, dtype=torch.int64), "floating"),
        (torch.zeros(0, 3, 16), "M = 0"),
        (torch.zeros(2, 3, 17), "17 wide"),
        (torch.zeros(2, 5, 3, 16), "5 layers"),
        ([1], "list"),
    ],
)
def test_bad_prompts(prompts, message):
    vit = FrozenViT.from_timm(literal.tiny_vit())
    with pytest.raises(PromptError, match=message):
        encode(vit, prompts, torch.zeros(1, 3, 16, 16))


def test_bad_options_and_empty_batch():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    prompts, images = _inputs(dtype=torch.float32)
    with pytest.raises(OptionError, match="micro_batch"):
        encode(vit, prompts, images, micro_batch=0)
    with pytest.raises(BackboneError, match=r"pack a timm model once, with FrozenViT\.from_timm"):
        encode(literal.tiny_vit(), prompts, images)
    with pytest.raises(OptionError, match="impl"):
        encode(vit, prompts, images, impl="magic")
    with pytest.raises(DataError):
        encode(vit, prompts, images[:, :2])
    assert encode(vit, prompts, images[:0]).shape == (3, 0, 16)
