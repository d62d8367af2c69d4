"""Where a prompt that has seen no task starts."""

from __future__ import annotations

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.errors import BackboneError, OptionError
from hgprompt.tuning.streams import uniform_within


def random_prompt(backbone: FrozenViT, num_tokens: int, *, deep: bool = False, seed: int = 42) -> Tensor:
    """VPT's random start: uniform in ±√(6 / (3·patch area + d)), float32, [p, d] or deep [L, p, d].

    Prompts of one pool should share the seed: tokens carry no position, so a mixture Σ α_i P_i is meaningful only where
    token j of every prompt has a common origin.
    """
    if not isinstance(backbone, FrozenViT):
        raise BackboneError(f"backbone must be a FrozenViT (FrozenViT.from_timm), got {type(backbone).__name__}")
    if num_tokens < 1:
        raise OptionError(f"a prompt has at least 1 token, got {num_tokens}")
    height, width = backbone.patch_size
    bound = (6 / (3 * height * width + backbone.width)) ** 0.5
    shape = (backbone.depth, num_tokens, backbone.width) if deep else (num_tokens, backbone.width)
    generator = torch.Generator().manual_seed(seed)
    return uniform_within(bound, generator, *shape)
