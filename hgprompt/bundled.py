"""load_backbone: the bundled mini backbone, or any that timm knows, by name.

"mini" is a ViT with 64-pixel input, 8-pixel patches, width 192, 8 blocks, 3 heads: 3.6 million weights, distilled from
CLIP ViT-B/16 without labels (recipes/mini). docs/mini.md says what its features are worth.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import nn

from hgprompt.arguments import check_place
from hgprompt.backbone import FrozenViT, create_model
from hgprompt.errors import BackboneError
from hgprompt.files import read_safetensors

MINI = "mini"
_MINI_ARCHITECTURE = {"patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3, "num_classes": 0}
_MINI_SIZE = 64
_MINI_FILE = "mini.safetensors"
_OWN_WEIGHTS = "the mini backbone comes with its weights: it takes img_size, and nothing else"


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | None = None,
    **timm_options: Any,
) -> FrozenViT:
    """A frozen backbone by name.

    Args:
        name: "mini", which comes with hgprompt, or a timm model name.
        dtype: compute dtype; None: float32, or the model's own.
        device: None: a GPU if there is one.
        checkpoint, timm_options: as for `FrozenViT.from_timm`; the mini backbone takes `img_size` alone.

    Raises:
        BackboneError: no such model, or its weights could not be had. OptionError: a device that there is not, or a
            dtype that is none.
    """
    check_place(device, dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name != MINI:
        return FrozenViT.from_timm(name, dtype=dtype, device=device, checkpoint=checkpoint, **timm_options)
    return FrozenViT(load_model(name, checkpoint=checkpoint, **timm_options), name=MINI, dtype=dtype).to(device)


def load_model(name: str, *, checkpoint: str | None = None, **timm_options: Any) -> nn.Module:
    """The network that `load_backbone` packs, as a timm VisionTransformer in float32 on the CPU: to train parts of it.

    Args and errors: as for `load_backbone`.
    """
    if name != MINI:
        return create_model(name, checkpoint is None, checkpoint, timm_options).float().eval()
    if checkpoint is not None or set(timm_options) - {"img_size"}:
        raise BackboneError(_OWN_WEIGHTS)
    size = timm_options.get("img_size", _MINI_SIZE)
    patch = _MINI_ARCHITECTURE["patch_size"]
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or any(type(pixels) is not int or pixels < patch or pixels % patch for pixels in sides):
        raise BackboneError(
            f"img_size must be one or two multiples of the mini backbone's patches of {patch} pixels, got {size!r}"
        )
    return mini_model((sides[0], sides[1]))


def mini_model(img_size: int | tuple[int, int] = _MINI_SIZE, *, pretrained: bool = True) -> nn.Module:
    """The mini backbone as a timm VisionTransformer, float32, in eval mode.

    Args:
        img_size: pixels; other sizes than 64 resample the position embedding.
        pretrained: False: random weights, for comparison.
    """
    from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from timm.layers import resample_abs_pos_embed
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("cpu"), torch.random.fork_rng(devices=[]):  # timm draws weights from the global generator
        model = VisionTransformer(img_size=img_size, **_MINI_ARCHITECTURE).float()
    model.pretrained_cfg = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD, "interpolation": "bicubic"}
    if pretrained:
        with resources.as_file(resources.files("hgprompt") / "weights" / _MINI_FILE) as path:
            state, _ = read_safetensors(path)
        state = {key: value.float() for key, value in state.items()}
        if state["pos_embed"].shape != model.pos_embed.shape:
            state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(model.patch_embed.grid_size))
        model.load_state_dict(state)
    return model.eval()


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware (a GPU from sm_80 on), float32 elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32
