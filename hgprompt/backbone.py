"""FrozenViT: a timm VisionTransformer, packed for the encoder.

Packing copies the weights once, in float64, and folds what frozen weights allow to fold (`hgprompt.packing`). The model
that was passed in is never changed.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hgprompt.arguments import check_place
from hgprompt.errors import BackboneError, DataError
from hgprompt.kernels.compiler import copied
from hgprompt.packing import PackedBlock, overrides, refuse
from hgprompt.pool import BackboneInfo

logger = logging.getLogger(__name__)

_POOLS = ("token", "avg", "map")


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
        self._micro_batch: Any = None  # of forward: what suits the device is found once
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
            BackboneError: not one finite number per channel, a std that is not positive, or an unknown filter.
        """
        from hgprompt.data.folders import INTERPOLATIONS

        if interpolation not in (None, *INTERPOLATIONS):
            raise BackboneError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
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
        if images.ndim == 3:
            raise DataError(
                f"images must be batches [B, {', '.join(map(str, expected))}], got one image {list(images.shape)}: a "
                "Dataset goes into a DataLoader first"
            )
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
        images = copied(images, self.device)
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
        from hgprompt.encoder import MicroBatch, encode

        self._micro_batch = self._micro_batch or MicroBatch()
        empty = torch.empty(1, 0, self.width, dtype=self.dtype, device=self.device)
        return encode(self, empty, images, micro_batch=self._micro_batch)[0]


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


def _timm_name(config: Mapping[str, Any]) -> str:
    """architecture.tag, which `timm.create_model` takes back: the tag says which of several pretrained weights."""
    architecture, tag = config.get("architecture") or "", config.get("tag") or ""
    return f"{architecture}.{tag}" if architecture and tag else architecture


def _require_supported(model: nn.Module) -> None:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        refuse(type(model).__name__, "it is not a timm VisionTransformer")
    changed = overrides(model, VisionTransformer, ("forward", "forward_features", "forward_head", "pool", "_pos_embed"))
    if changed:
        refuse(type(model).__name__, f"it computes its own {changed}()")
    if model.global_pool not in _POOLS:
        refuse(type(model).__name__, f"global_pool={model.global_pool!r} is none of {', '.join(_POOLS)}")
    if not (isinstance(model.patch_embed, PatchEmbed) and isinstance(model.patch_embed.proj, nn.Conv2d)):
        kind = type(model.patch_embed).__name__
        refuse(type(model).__name__, f"its patches come from a {kind}, and not from one convolution")
    if any(weight.is_meta for weight in model.parameters()):
        refuse(type(model).__name__, "its weights are on the meta device, and have no values: load them first")
    if model.patch_embed.img_size is None:
        refuse(type(model).__name__, "it has no fixed image size; make it with img_size=...")
    if len(model.blocks) == 0:
        refuse(type(model).__name__, "it has no blocks")
    for name, module in model.named_modules():
        # The encoder takes the weights and computes what the class would: what was put around that would be lost.
        if "forward" in vars(module):
            refuse(name or type(model).__name__, "its forward() has been replaced")
        if module._forward_hooks or module._forward_pre_hooks:
            refuse(name or type(model).__name__, "it has forward hooks, which the encoder does not call: remove them")


def _position(model: Any) -> tuple[Tensor, Tensor | None]:
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
        hint = "; give its weights as a safetensors file (checkpoint=, or --weights)" if pretrained else ""
        raise BackboneError(f"timm could not make {name!r}: {error}{hint}") from error
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
