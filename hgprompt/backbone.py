"""FrozenViT: a timm VisionTransformer, packed for the encoder.

Packing copies the weights once, in float64, and folds what frozen weights allow to fold: the affine part of
each block's LayerNorm goes into the linear layer that follows it, LayerScale into the one before it, and
QuickGELU becomes SiLU (quick_gelu(x) = silu(1.702 x) / 1.702). The model that was passed in is never changed.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from hgprompt.arguments import check_place
from hgprompt.errors import BackboneError, DataError
from hgprompt.kernels.mlp import Activation
from hgprompt.kernels.norm import NormKind
from hgprompt.pool import BackboneInfo

logger = logging.getLogger(__name__)

QUICK_GELU_SLOPE = 1.702
_ACTIVATIONS: dict[str, Activation | Literal["quick_gelu"]] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
}
_POOLS = ("token", "avg", "map")


@dataclass(frozen=True)
class NormSpec:
    """Which normalisation, and its epsilon."""

    kind: NormKind
    eps: float


class PackedNorm(nn.Module):
    """A normalisation that keeps its affine part (QK-norm, and norms inside attention or MLP)."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: nn.Module, where: str) -> None:
        super().__init__()
        self.spec = _norm_spec(norm, where)
        for name in ("weight", "bias"):
            value = getattr(norm, name, None)
            self.register_buffer(name, None if value is None else value.detach().double(), persistent=False)


class PackedBlock(nn.Module):
    """Weights of one transformer block with affine parts and LayerScale folded in.

    qkv [3a, d], proj [d, a], fc1 [f, d] (gated: [2f, d], gate rows first), fc2 [d, f]; a = heads · head width.
    """

    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor
    proj_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    def __init__(self, block: Any, where: str) -> None:
        super().__init__()
        _require_class(block, "Block", where)
        _require_class(block.attn, "Attention", f"{where}.attn")
        attn: Any = block.attn
        if getattr(attn, "gate", None) is not None:
            _refuse(f"{where}.attn", "its attention output is gated, which the encoder does not compute")
        self.num_heads: int = attn.num_heads
        self.head_dim: int = attn.head_dim
        self.scale: float = attn.scale
        self.norm1 = _norm_spec(block.norm1, f"{where}.norm1")
        self.norm2 = _norm_spec(block.norm2, f"{where}.norm2")
        self.q_norm = _optional_norm(attn.q_norm, f"{where}.attn.q_norm")
        self.k_norm = _optional_norm(attn.k_norm, f"{where}.attn.k_norm")
        self.attn_norm = _optional_norm(getattr(attn, "norm", nn.Identity()), f"{where}.attn.norm")
        self.mlp_norm = _optional_norm(getattr(block.mlp, "norm", nn.Identity()), f"{where}.mlp.norm")

        qkv = _fold_norm(block.norm1, *_linear(attn.qkv, f"{where}.attn.qkv"))
        proj = _fold_scale(block.ls1, *_linear(attn.proj, f"{where}.attn.proj"), where=f"{where}.ls1")
        fc1, fc2, activation, self.gated = _mlp_weights(block.mlp, f"{where}.mlp")
        fc1 = _fold_norm(block.norm2, *fc1)
        if activation == "quick_gelu":
            fc1, fc2, activation = self._quick_gelu_as_silu(fc1, fc2, where)
        self.activation: Activation = activation
        fc2 = _fold_scale(block.ls2, *fc2, where=f"{where}.ls2")
        for name, (weight, bias) in {"qkv": qkv, "proj": proj, "fc1": fc1, "fc2": fc2}.items():
            self.register_buffer(f"{name}_weight", weight.contiguous(), persistent=False)
            self.register_buffer(f"{name}_bias", bias, persistent=False)

    def _quick_gelu_as_silu(self, fc1: _Linear, fc2: _Linear, where: str) -> tuple[_Linear, _Linear, Literal["silu"]]:
        if self.mlp_norm is not None or self.gated:
            _refuse(f"{where}.mlp", "QuickGELU together with a gated or normalised MLP is not supported")
        weight, bias = fc1
        fc1 = weight * QUICK_GELU_SLOPE, None if bias is None else bias * QUICK_GELU_SLOPE
        return fc1, (fc2[0] / QUICK_GELU_SLOPE, fc2[1]), "silu"


class FrozenViT(nn.Module):
    """A frozen Vision Transformer, ready for `hgprompt.encode`.

    Holds buffers only, so that no optimiser, no gradient and no `state_dict` ever meets its weights; `.to()`
    moves it as any module. The feature is what timm's head reads: CLS after the final norm, or the pooled image
    tokens. Prompts take part in attention and never in the pooling.

    Attributes:
        name: timm's name, with the tag of its weights. width: d = h. depth: L. num_heads, head_dim.
        image_size, patch_size: (height, width) in pixels. num_image_tokens: S, patches and prefix (CLS, registers).
        mean, std: normalisation of uint8 images (timm's data config). interpolation: its resize filter.
        info: name and fingerprint, as a PromptPool records them.
    """

    prefix: Tensor
    patch_position: Tensor | None

    @torch.inference_mode(False)  # weights that were made inside it would let no gradient pass
    def __init__(self, model: nn.Module, *, name: str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        _require_supported(model)
        source: Any = model
        config = getattr(model, "pretrained_cfg", None) or {}
        self.name: str = name or _timm_name(config) or type(model).__name__
        self.width: int = source.embed_dim
        self.depth: int = len(source.blocks)
        self.pool: str = source.global_pool
        self.num_prefix_tokens: int = source.num_prefix_tokens
        self.pool_includes_prefix: bool = source.pool_include_prefix
        self.image_size: tuple[int, int] = tuple(source.patch_embed.img_size)
        self.patch_size: tuple[int, int] = tuple(source.patch_embed.patch_size)
        self.in_channels: int = source.patch_embed.proj.in_channels
        self.interpolation: str = config.get("interpolation") or "bicubic"
        self.num_image_tokens: int = source.patch_embed.num_patches + self.num_prefix_tokens

        self.patch_embed = _frozen_copy(source.patch_embed)
        self.norm_pre = _frozen_copy(source.norm_pre)
        self.norm = _frozen_copy(source.norm)
        self.fc_norm = _frozen_copy(source.fc_norm)
        self.attn_pool = None if source.attn_pool is None else _frozen_copy(source.attn_pool)
        prefix, patch_position = _position(source)
        self.register_buffer("prefix", prefix, persistent=False)
        self.register_buffer("patch_position", patch_position, persistent=False)
        self.mean: tuple[float, ...] = tuple(config.get("mean") or (0.5,) * self.in_channels)
        self.std: tuple[float, ...] = tuple(config.get("std") or (0.5,) * self.in_channels)
        self._normalizers: dict[Any, Tensor] = {}
        # Block by block into the compute dtype: the whole network in float64 would be the peak of a program's memory.
        dtype = dtype or source.patch_embed.proj.weight.dtype
        self._blocks = nn.ModuleList(PackedBlock(b, f"blocks.{i}").to(dtype=dtype) for i, b in enumerate(source.blocks))
        self.num_heads: int = source.blocks[0].attn.num_heads
        self.head_dim: int = source.blocks[0].attn.head_dim
        self.fingerprint = fingerprint(model)
        self.to(dtype).eval()

    @classmethod
    def from_timm(
        cls,
        model_or_name: nn.Module | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        **timm_options: Any,
    ) -> FrozenViT:
        """Pack a timm VisionTransformer.

        Args:
            model_or_name: a `timm.models.vision_transformer.VisionTransformer`, or a name for `timm.create_model`.
            dtype: compute dtype; None: the model's own.
            device: None: where the model is.
            pretrained: for a name: load timm's weights for it (needs them cached, or the network).
            checkpoint: for a name: a state dict as safetensors, instead of timm's weights.
            timm_options: for a name: passed to `timm.create_model`, e.g. `img_size=112`.

        Returns:
            The packed backbone in eval mode.

        Raises:
            BackboneError: the model is of a kind that the encoder does not compute (the message names the part
                and the reason), or its weights could not be had.
            OptionError: a device that there is not, or a dtype that is none.
        """
        check_place(device, dtype)
        name = None
        if isinstance(model_or_name, str):
            # timm's tag says which pretrained weights; with other weights it would be wrong.
            name = model_or_name if checkpoint is not None or not pretrained else None
            model = create_model(model_or_name, pretrained and checkpoint is None, checkpoint, timm_options)
        elif timm_options or checkpoint is not None:
            raise BackboneError("checkpoint and timm options go with a model name, not with a model already made")
        else:
            model = model_or_name
        packed = cls(model, name=name, dtype=dtype)
        return packed if device is None else packed.to(device)

    @property
    def blocks(self) -> list[PackedBlock]:
        """The L blocks, in order."""
        return list(self._blocks)  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.prefix.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prefix.device

    @property
    def info(self) -> BackboneInfo:
        """What a PromptPool records of the backbone that its prompts were tuned for."""
        return BackboneInfo(
            name=self.name,
            fingerprint=self.fingerprint,
            width=self.width,
            depth=self.depth,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
        )

    def set_preprocessing(
        self,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
    ) -> FrozenViT:
        """Use another normalisation or resize filter than timm's data config for these weights; itself.

        Args:
            mean, std: one number per channel, of images in 0 … 1. interpolation: "bicubic", "bilinear", …
                None: as it is.

        Raises:
            BackboneError: not one finite number per channel, or a std that is not positive.
        """
        found = {"mean": self.mean, "std": self.std}
        for name, values in (("mean", mean), ("std", std)):
            if values is None:
                continue
            try:
                found[name] = tuple(float(v) for v in values)
            except (TypeError, ValueError):
                raise BackboneError(f"{name} must be {self.in_channels} numbers, got {values!r:.80}") from None
            finite = all(math.isfinite(v) and (name == "mean" or v > 0) for v in found[name])
            if len(found[name]) != self.in_channels or not finite:
                raise BackboneError(
                    f"{name} must be {self.in_channels} finite numbers, std positive; got {found[name]}"
                )
        self.mean, self.std = found["mean"], found["std"]
        self.interpolation = interpolation or self.interpolation
        return self

    def extra_repr(self) -> str:
        return f"{self.name}, width={self.width}, depth={self.depth}, image_size={self.image_size}, {self.dtype}"

    def check_images(self, images: Tensor) -> None:
        """Raise DataError unless images are [B, C, H, W] of this backbone's size, floating or uint8."""
        if not isinstance(images, Tensor):
            raise DataError(f"images must be a torch.Tensor [B, 3, H, W], got {type(images).__name__}")
        expected = (self.in_channels, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            channels, height, width = expected
            raise DataError(
                f"images must be [B, {channels}, {height}, {width}] for {self.name}, got {list(images.shape)}; "
                f"resize them, or make the backbone with img_size={tuple(images.shape[2:]) or '...'}"
            )
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise DataError(
                f"images must be floating point (normalised) or uint8 (0 … 255, normalised here), got {images.dtype}"
            )

    def prepare(self, images: Tensor) -> Tensor:
        """Images on this device in the compute dtype; uint8 images normalised with `mean` and `std`."""
        images = images.to(self.device)
        if images.dtype == torch.uint8:
            # float32 at least: 1/255 steps are lost in bfloat16 before the mean is taken off.
            precise = torch.promote_types(self.dtype, torch.float32)
            # Made once: a copy to a GPU would wait for all that was asked of it before.
            key = (self.mean, self.std, self.device, precise)
            if key not in self._normalizers:
                numbers = torch.tensor([self.mean, self.std], dtype=precise, device=self.device)
                self._normalizers = {key: numbers[:, :, None, None]}
            mean, std = self._normalizers[key]
            images = (images.to(precise) / 255 - mean) / std
        return images.to(self.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Prepared images [B, C, H, W] → tokens [B, S, d]: prefix first, positions added, before the pre-norm."""
        patches = self.patch_embed(images)
        if patches.ndim == 4:  # models with dynamic_img_size leave the grid as it is
            patches = patches.flatten(1, 2)
        if self.patch_position is not None:
            patches = patches + self.patch_position
        return torch.cat([self.prefix.expand(len(patches), -1, -1), patches], dim=1)

    def pooled(self, tokens: Tensor) -> Tensor:
        """Image tokens after the last block, [B, S, d] (or [B, 1, d], the CLS row alone) → features [B, h]."""
        tokens = self.norm(tokens)
        if self.attn_pool is not None:
            pooled = self.attn_pool(tokens if self.pool_includes_prefix else tokens[:, self.num_prefix_tokens :])
        elif self.pool == "token":
            pooled = tokens[:, 0]
        else:
            pooled = (tokens if self.pool_includes_prefix else tokens[:, self.num_prefix_tokens :]).mean(1)
        return self.fc_norm(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, h] without prompts: timm's `forward_head(forward_features(images), pre_logits=True)`."""
        from hgprompt.encoder import encode

        empty = torch.empty(1, 0, self.width, dtype=self.dtype, device=self.device)
        return encode(self, empty, images)[0]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, the same for float32, bfloat16 or any device.

    Left out are the classifier (a prompt does not meet it) and the position embedding, so that one network at two
    input sizes is one backbone: prompts carry no position.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name.startswith(("head.", "head_drop.")) or name == "pos_embed":
            continue
        digest.update(f"{name}{list(value.shape)}".encode())
        rounded = value.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


_Linear = tuple[Tensor, "Tensor | None"]


def _timm_name(config: Mapping[str, Any]) -> str:
    """architecture.tag, which `timm.create_model` takes back: the tag says which of several pretrained weights."""
    architecture, tag = config.get("architecture") or "", config.get("tag") or ""
    return f"{architecture}.{tag}" if architecture and tag else architecture


def _refuse(where: str, reason: str) -> NoReturn:
    raise BackboneError(f"cannot pack {where}: {reason}. Supported: timm's VisionTransformer with standard blocks")


def _overrides(module: nn.Module, base: type, methods: tuple[str, ...]) -> str | None:
    return next((m for m in methods if getattr(type(module), m) is not getattr(base, m)), None)


def _require_supported(model: nn.Module) -> None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        _refuse(type(model).__name__, "it is not a timm VisionTransformer")
    changed = _overrides(
        model, VisionTransformer, ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
    )
    if changed:
        _refuse(type(model).__name__, f"it computes its own {changed}()")
    if model.global_pool not in _POOLS:
        _refuse(type(model).__name__, f"global_pool={model.global_pool!r} is none of {', '.join(_POOLS)}")
    if model.patch_embed.img_size is None:
        _refuse(type(model).__name__, "it has no fixed image size; make it with img_size=...")
    if len(model.blocks) == 0:
        _refuse(type(model).__name__, "it has no blocks")
    for name, module in model.named_modules():
        # The encoder takes the weights and computes what the class would: what was put around that would be lost.
        if "forward" in vars(module):
            _refuse(name or type(model).__name__, "its forward() has been replaced")
        if module._forward_hooks or module._forward_pre_hooks:
            _refuse(name or type(model).__name__, "it has forward hooks, which the encoder does not call: remove them")


def _require_class(module: nn.Module, expected: str, where: str) -> None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    base: type = {"Block": Block, "Attention": Attention}[expected]
    if not isinstance(module, base) or _overrides(module, base, ("forward",)):
        _refuse(where, f"{type(module).__name__} is not timm's {expected}")


def _require_own_forward_of_a_library(module: nn.Module, where: str) -> None:
    """Refuse a subclass from elsewhere that computes something of its own, low-rank updates for example."""
    if not type(module).forward.__module__.startswith(("torch.nn.", "timm.")):
        _refuse(where, f"{type(module).__name__} computes its own forward()")


def _norm_spec(norm: nn.Module, where: str) -> NormSpec:
    from timm.layers import RmsNorm

    _require_own_forward_of_a_library(norm, where)
    if isinstance(norm, nn.LayerNorm):
        return NormSpec("layer", norm.eps)
    if isinstance(norm, (RmsNorm, nn.RMSNorm)):
        eps = norm.eps
        return NormSpec("rms", float(eps) if eps is not None else torch.finfo(torch.float32).eps)
    _refuse(where, f"{type(norm).__name__} is neither LayerNorm nor RMSNorm")


def _optional_norm(norm: nn.Module, where: str) -> PackedNorm | None:
    return None if isinstance(norm, nn.Identity) else PackedNorm(norm, where)


def _linear(layer: nn.Module, where: str) -> _Linear:
    """Weight and bias in float64."""
    if not isinstance(layer, nn.Linear):
        _refuse(where, f"{type(layer).__name__} is not Linear; merge adapters into the weights first")
    _require_own_forward_of_a_library(layer, where)
    bias = None if layer.bias is None else layer.bias.detach().double()
    return layer.weight.detach().double(), bias


def _fold_norm(norm: nn.Module, weight: Tensor, bias: Tensor | None) -> _Linear:
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if shift is not None:
        folded = weight @ shift.detach().double()
        bias = folded if bias is None else bias + folded
    if scale is not None:
        weight = weight * scale.detach().double()
    return weight, bias


def _fold_scale(layer_scale: nn.Module, weight: Tensor, bias: Tensor | None, where: str) -> _Linear:
    from timm.layers import LayerScale

    if isinstance(layer_scale, nn.Identity):
        return weight, bias
    if not isinstance(layer_scale, LayerScale) or _overrides(layer_scale, LayerScale, ("forward",)):
        _refuse(where, f"{type(layer_scale).__name__} is not timm's LayerScale")
    gamma = layer_scale.gamma.detach().double()
    return weight * gamma[:, None], None if bias is None else bias * gamma


def _mlp_weights(mlp: Any, where: str) -> tuple[_Linear, _Linear, Any, bool]:
    """Both linear layers, the activation, and whether the first is gated (gate rows first)."""
    from timm.layers import GluMlp, Mlp, SwiGLU

    kind = type(getattr(mlp, "act", None))
    activation = _ACTIVATIONS.get(kind.__name__)
    if activation is None or not kind.__module__.startswith(("torch.nn.", "timm.")):
        _refuse(f"{where}.act", f"activation {kind.__name__} is none of {', '.join(_ACTIVATIONS)} of torch and timm")
    if activation == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh":
        activation = "gelu_tanh"
    if isinstance(mlp, SwiGLU) and not _overrides(mlp, SwiGLU, ("forward",)):
        gate, value = _linear(mlp.fc1_g, f"{where}.fc1_g"), _linear(mlp.fc1_x, f"{where}.fc1_x")
    elif isinstance(mlp, GluMlp) and not _overrides(mlp, GluMlp, ("forward",)):
        weight, bias = _linear(mlp.fc1, f"{where}.fc1")
        halves = list(zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2), strict=True))
        value, gate = halves if mlp.gate_last else halves[::-1]
    elif isinstance(mlp, Mlp) and not _overrides(mlp, Mlp, ("forward",)):
        return _linear(mlp.fc1, f"{where}.fc1"), _linear(mlp.fc2, f"{where}.fc2"), activation, False
    else:
        _refuse(where, f"{type(mlp).__name__} is none of timm's Mlp, GluMlp, SwiGLU")
    bias = None if gate[1] is None or value[1] is None else torch.cat([gate[1], value[1]])
    return (torch.cat([gate[0], value[0]]), bias), _linear(mlp.fc2, f"{where}.fc2"), activation, True


def _position(model: Any) -> _Linear:
    """Prefix tokens [1, n, d] with their positions, and the positions [1, S-n, d] of the patches."""
    empty = model.patch_embed.proj.weight.new_empty(1, 0, model.embed_dim)
    tokens = [t.detach().double() for t in (model.cls_token, model.reg_token) if t is not None]
    prefix = torch.cat([empty.detach().double(), *tokens], dim=1)
    if model.pos_embed is None:
        return prefix, None
    position = model.pos_embed.detach().double()
    if model.no_embed_class:
        return prefix, position
    split = model.num_prefix_tokens
    return prefix + position[:, :split], position[:, split:]


def _frozen_copy(module: nn.Module) -> Any:
    """A copy in eval mode whose parameters have become buffers outside the state dict."""
    frozen = copy.deepcopy(module).eval()
    for part in frozen.modules():
        for name, parameter in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if parameter is None else parameter.detach(), persistent=False)
    return frozen


def create_model(name: str, pretrained: bool, checkpoint: str | None, options: dict[str, Any]) -> nn.Module:
    """A timm model with timm's weights, with those of a safetensors file, or with random ones; or BackboneError."""
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:8])
        raise BackboneError(f"timm knows no model {name!r}" + (f"; similar names: {near}" if near else ""))
    options = {"num_classes": 0} | options
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # timm draws weights from the global generator
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        hint = "give checkpoint=<safetensors file>, or a model that you made yourself" if pretrained else "see above"
        raise BackboneError(f"timm could not make {name!r}: {error}; {hint}") from error
    if checkpoint is not None:
        _load_checkpoint(model, name, checkpoint)
    return model


def _load_checkpoint(model: Any, name: str, path: str) -> None:
    from timm.layers import resample_abs_pos_embed

    from hgprompt.files import read_safetensors

    state, _ = read_safetensors(path)
    state = {k: v for k, v in state.items() if not k.startswith("head.")}
    stored = state.get("pos_embed")
    if stored is not None and model.pos_embed is not None and stored.shape != model.pos_embed.shape:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        state["pos_embed"] = resample_abs_pos_embed(stored, list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise BackboneError(f"{path} does not fit {name}: {error}") from error
    missing = [k for k in missing if not k.startswith("head.")]
    if missing or unexpected:
        raise BackboneError(
            f"{path} does not fit {name}: {len(missing)} weights missing {missing[:3]}, "
            f"{len(unexpected)} unknown {unexpected[:3]}"
        )
