"""FrozenViT against timm's own forward, and what it refuses."""

from __future__ import annotations

import copy

import literal
import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer

from hgprompt import load_backbone
from hgprompt.backbone import FrozenViT, fingerprint
from hgprompt.errors import BackboneError, DataError, OptionError

# (name, options): augreg, DeiT-3 (no_embed_class, LayerScale), DINOv2 with and without registers, SwiGLU, CLIP
# (pre-norm, both GELUs), SigLIP (attention pooling, tanh GELU), average pooling, QK-norm, other patches and sizes.
# img_size keeps the large ones quick; the weights are random.
NAMED = [
    ("vit_tiny_patch16_224", {}),
    ("vit_small_patch32_224", {}),
    ("vit_base_patch16_224", {"depth": 2}),
    ("deit3_small_patch16_224", {"depth": 3, "init_values": 0.1}),
    ("vit_small_patch14_dinov2", {"img_size": 56, "depth": 3}),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 3}),
    ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 1}),
    ("vit_base_patch32_clip_224", {"depth": 2}),
    ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64, "depth": 3}),
    ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 2}),
    ("vit_base_patch16_siglip_gap_224", {"img_size": 64, "depth": 2}),
    ("vit_medium_patch16_gap_240", {"depth": 2}),
    ("vit_medium_patch16_reg1_gap_256", {"depth": 2}),
    ("vit_small_patch16_384", {"img_size": (64, 96), "depth": 2}),
    ("vit_wee_patch16_reg1_gap_256", {"depth": 3}),
]
VARIANTS = [
    {"qk_norm": True},
    {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    {"pre_norm": True, "qkv_bias": False, "proj_bias": False},
    {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
    {"mlp_layer": timm.layers.SwiGLU},
    {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    {"mlp_layer": timm.layers.GluMlp},
    {"norm_layer": timm.layers.RmsNorm, "qk_norm": True},
    {"pos_embed": "none"},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg", "pool_include_prefix": True},
    {"dynamic_img_size": True},
    {"depth": 1},
]


@pytest.mark.parametrize(("name", "options"), NAMED, ids=[n for n, _ in NAMED])
def test_equals_timm_forward(name, options):
    model = literal.named_vit(name, **options)
    vit = FrozenViT.from_timm(model)
    images = torch.randn(2, 3, *vit.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        actual = vit(images)
    # Folding moves roundings, nothing else: a few float32 ulps per layer.
    assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_timm_in_float64(options):
    model = literal.tiny_vit(**options).double()
    vit = FrozenViT.from_timm(model)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(vit(images), expected, rtol=1e-10, atol=1e-10)


def test_model_is_left_alone():
    model = literal.tiny_vit().train()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    vit = FrozenViT.from_timm(model, dtype=torch.bfloat16)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not list(vit.parameters())
    assert not vit.state_dict()
    assert vit.dtype == torch.bfloat16


def test_name_makes_a_model_without_touching_the_global_generator():
    rng = torch.get_rng_state()
    vit = FrozenViT.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert vit.name == "vit_tiny_patch16_224"


def test_name_of_a_model_has_the_tag_of_its_weights():
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=False, depth=1)
    name = FrozenViT.from_timm(model).name
    assert name == "vit_tiny_patch16_224.augreg_in21k"
    assert timm.is_model(name)  # it makes the same model again


def test_image_size_of_a_named_model():
    vit = FrozenViT.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=1)
    assert vit.image_size == (32, 32)


def test_checkpoint(tmp_path):
    from safetensors.torch import save_file

    model = literal.named_vit("vit_tiny_patch16_224", img_size=64, depth=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    vit = FrozenViT.from_timm(
        "vit_tiny_patch16_224", checkpoint=str(tmp_path / "weights.safetensors"), img_size=64, depth=2
    )
    assert vit.fingerprint == fingerprint(model)
    smaller = FrozenViT.from_timm(
        "vit_tiny_patch16_224", checkpoint=str(tmp_path / "weights.safetensors"), img_size=32, depth=2
    )
    assert smaller.fingerprint == vit.fingerprint  # one network at two input sizes
    with pytest.raises(BackboneError, match="missing"):
        FrozenViT.from_timm("vit_tiny_patch16_224", checkpoint=str(tmp_path / "weights.safetensors"), img_size=64)


def test_fingerprint_ignores_precision_and_head_and_sees_weights():
    model = literal.tiny_vit()
    other = copy.deepcopy(model)
    other.reset_classifier(7)
    assert fingerprint(model) == fingerprint(other) == fingerprint(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight[0, 0] += 1
    assert fingerprint(model) != fingerprint(other)


class _OwnForward(VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return x


class _LowRank(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class _Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return self.base(x) + x.sum(-1, keepdim=True)


class _Norm(torch.nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class _Scale(torch.nn.Module):
    gamma = torch.ones(16)

    def forward(self, x):
        return -x


def _with(change):
    def make():
        model = literal.tiny_vit()
        change(model.blocks[1])
        return model

    return make


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b.attn, "qkv", _LowRank(16, 48)), r"blocks\.1\.attn\.qkv.*_LowRank.*its own forward"),
        (lambda b: setattr(b.attn, "qkv", _Adapter(b.attn.qkv)), r"blocks\.1\.attn\.qkv.*_Adapter is not Linear"),
        (lambda b: setattr(b.mlp, "fc2", _LowRank(64, 16)), r"blocks\.1\.mlp\.fc2"),
        (lambda b: setattr(b, "norm2", _Norm(16)), r"blocks\.1\.norm2.*its own forward"),
        (lambda b: setattr(b, "ls1", _Scale()), r"blocks\.1\.ls1.*LayerScale"),
        (lambda b: setattr(b.mlp, "act", type("GELU", (torch.nn.ReLU,), {})()), r"blocks\.1\.mlp\.act"),
        (lambda b: setattr(b, "forward", lambda x, **_: x), r"blocks\.1.*replaced"),
        (lambda b: b.mlp.register_forward_hook(lambda *a: None), r"blocks\.1\.mlp.*hooks"),
        (lambda b: b.attn.register_forward_pre_hook(lambda *a: None), r"blocks\.1\.attn.*hooks"),
    ],
    ids=["low rank", "adapter", "fc2", "norm", "scale", "activation", "forward", "hook", "pre-hook"],
)
def test_models_that_were_changed_are_refused(change, reason):
    with pytest.raises(BackboneError, match=reason):
        FrozenViT.from_timm(_with(change)())


class _NoConvolution(timm.layers.PatchEmbed):
    def __init__(self, **options):
        super().__init__(**options)
        self.proj = torch.nn.Identity()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "not a timm VisionTransformer"),
        (lambda: timm.create_model("resnet18"), "ResNet"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), "Eva"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1), "VisionTransformerDistilled"),
        (lambda: literal.tiny_vit(block_fn=ResPostBlock), r"blocks\.0.*ResPostBlock"),
        (lambda: literal.tiny_vit(block_fn=ParallelScalingBlock), r"blocks\.0.*ParallelScalingBlock"),
        (lambda: literal.tiny_vit(attn_layer="diff"), r"blocks\.0\.attn.*DiffAttention"),
        (lambda: literal.tiny_vit(act_layer=torch.nn.Mish), r"mlp\.act.*Mish"),
        (lambda: literal.tiny_vit(global_pool="max"), "global_pool='max'"),
        (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "HybridEmbed"),
        (lambda: literal.tiny_vit(embed_layer=_NoConvolution), "_NoConvolution"),
        (lambda: literal.tiny_vit().to("meta"), "meta device"),
        (lambda: literal.tiny_vit(norm_layer=timm.layers.SimpleNorm), r"norm1.*SimpleNorm"),
        (
            lambda: _OwnForward(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2),
            "forward_features",
        ),
    ],
)
def test_unsupported_models_are_refused_by_name_and_reason(make, reason):
    with pytest.raises(BackboneError, match=reason):
        FrozenViT.from_timm(make())


def test_unknown_name_and_missing_weights():
    with pytest.raises(BackboneError, match=r"similar names: .*vit"):
        FrozenViT.from_timm("vit_bse_patch16_224")
    with pytest.raises(BackboneError, match="go with a model name"):
        FrozenViT.from_timm(literal.tiny_vit(), img_size=32)


def test_preprocessing_that_is_refused_changes_nothing():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    before = vit.mean, vit.std
    for bad in ({"mean": [0.1] * 3, "std": [0.0, 1.0, 1.0]}, {"mean": [0.1] * 3, "std": "abc"}, {"mean": [0.1] * 2}):
        with pytest.raises(BackboneError):
            vit.set_preprocessing(**bad)
        assert (vit.mean, vit.std) == before


@pytest.mark.parametrize(
    "options",
    [{"device": "gpu"}, {"device": "cuda:99"}, {"device": 1.5}, {"dtype": "float32"}, {"dtype": torch.int8}],
    ids=str,
)
def test_devices_and_dtypes_that_are_none(options):
    (name,) = options
    for make in (lambda: FrozenViT.from_timm(literal.tiny_vit(), **options), lambda: load_backbone("mini", **options)):
        with pytest.raises(OptionError, match=name):
            make()


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(3, 16, 16), torch.zeros(2, 1, 16, 16), torch.zeros(1, 3, 16, 16).int(), None],
    ids=["size", "ndim", "channels", "dtype", "type"],
)  # fmt: skip
def test_images_that_do_not_fit(images):
    with pytest.raises(DataError, match="images must be"):
        FrozenViT.from_timm(literal.tiny_vit())(images)


def test_uint8_images_are_normalised_with_the_data_config():
    model = literal.named_vit("vit_base_patch32_clip_224", depth=1)
    vit = FrozenViT.from_timm(model)
    raw = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(vit(raw), vit((raw.float() / 255 - mean) / std))
