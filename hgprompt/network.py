"""The network in plain PyTorch: image tokens × prompts → features, for one micro-batch.

This is the specification of every other engine, and the engine of the CPU. An engine is a module with the two
functions below; `hgprompt.encoder` picks one and knows nothing else of it.

Work that is not done, exactly:
- first block: LayerNorm and QKV of the image tokens are shared by all prompts, those of the prompts by all images;
- last block: only the rows that are pooled get a query, a projection and an MLP (for a CLS feature: one row);
- deep prompts: what a block makes of its prompt tokens is thrown away, so they are keys and values alone;
- frozen weights get no gradient, and neither do the image tokens before they have met a prompt.

The residual stream is float32 where the compute dtype is lower: it costs little memory traffic and saves the error of
24 roundings.

Letters in shapes: M prompts, B images, S image tokens (prefix and patches), p prompt tokens, H heads, D head width.
Prompt tokens stand after the image tokens here; attention has no order, so the feature is that of [CLS; P; patches].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels.attention import attention
from hgprompt.kernels.mlp import hidden
from hgprompt.kernels.norm import normalize

if TYPE_CHECKING:
    from hgprompt.backbone import FrozenViT, NormSpec, PackedBlock, PackedNorm


@dataclass(frozen=True)
class ImageTokens:
    """What all prompts share of a few images: tokens at the first block, and their queries, keys, values there."""

    x: Tensor  # [B, S, d]
    q: Tensor  # [B, S, H, D]
    k: Tensor  # [B, S, H, D]
    v: Tensor  # [B, S, H, D]


def embed(vit: FrozenViT, images: Tensor) -> ImageTokens:
    """Prepared images [B, C, H, W] → the part of the first block that no prompt touches."""
    x = _residual(vit.norm_pre(vit.embed(images)))
    return ImageTokens(x, *_qkv(vit.blocks[0], x))


def features(vit: FrozenViT, tokens: ImageTokens, prompts: Tensor) -> Tensor:
    """Features of every image under every prompt (Eq. 3).

    Args:
        vit: the packed backbone.
        tokens: of B images, from `embed`.
        prompts: [M, p, d] shallow or [M, L, p, d] deep, in the backbone's dtype and device.

    Returns:
        [M, B, h] in the backbone's dtype; differentiable in the prompts.
    """
    deep = prompts.ndim == 4
    x, num_rows = _first_block(vit, tokens, prompts[:, 0] if deep else prompts, keep_prompts=not deep)
    for i, block in enumerate(vit.blocks[1:], start=1):
        if i == vit.depth - 1 and vit.pool == "token":
            num_rows = 1
        prefix = _qkv(block, _residual(prompts[:, i]))[1:] if deep else None
        x = _block(block, x, num_rows if i == vit.depth - 1 else x.shape[2], prefix)
    m, b = x.shape[:2]
    return vit.pooled(x[:, :, :num_rows].flatten(0, 1).to(vit.dtype)).unflatten(0, (m, b))


def _first_block(vit: FrozenViT, tokens: ImageTokens, prompts: Tensor, keep_prompts: bool) -> tuple[Tensor, int]:
    """First block → [M, B, T, d] with T = S + p (or S, where the prompts' own outputs are not needed), and S."""
    block = vit.blocks[0]
    m, b, s = len(prompts), *tokens.x.shape[:2]
    prompts = _residual(vit.norm_pre(prompts))
    q, k, v = _qkv(block, prompts)
    keys, values = _beside(tokens.k, k), _beside(tokens.v, v)
    if keep_prompts:
        queries, x = _beside(tokens.q, q), _beside(tokens.x, prompts)
    else:
        queries, x = (t.expand(m, *t.shape) for t in (tokens.q, tokens.x))
    mixed = attention(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), block.scale)
    return _project_and_mlp(block, x, mixed.unflatten(0, (m, b))), s


def _block(block: PackedBlock, x: Tensor, num_rows: int, prefix: tuple[Tensor, ...] | None) -> Tensor:
    """A later block on x [M, B, T, d] → [M, B, num_rows, d], with the prompts' keys and values if they are deep."""
    m, b, t, _ = x.shape
    if num_rows == t:
        q, k, v = _qkv(block, x)
    else:
        width = block.num_heads * block.head_dim
        z = _normalized(x, block.norm1, block.qkv_weight.dtype)
        q = _heads(block, z[:, :, :num_rows], 0, width)
        k, v = _heads(block, z, width, 3 * width).chunk(2, dim=-2)
        q, k = _norm_heads(block.q_norm, q), _norm_heads(block.k_norm, k)
        x = x[:, :, :num_rows]
    if prefix is not None:
        k, v = (
            torch.cat([a, p[:, None].expand(m, b, *p.shape[1:])], dim=2) for a, p in zip((k, v), prefix, strict=True)
        )
    mixed = attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), block.scale)
    return _project_and_mlp(block, x, mixed.unflatten(0, (m, b)))


def _project_and_mlp(block: PackedBlock, x: Tensor, mixed: Tensor) -> Tensor:
    x = x + F.linear(_norm_heads(block.attn_norm, mixed), block.proj_weight, block.proj_bias)
    z = _normalized(x, block.norm2, block.fc1_weight.dtype)
    z = hidden(z, block.fc1_weight, block.fc1_bias, block.activation, block.gated)
    return x + F.linear(_norm_heads(block.mlp_norm, z), block.fc2_weight, block.fc2_bias)


def _qkv(block: PackedBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [..., T, H, D] of tokens [..., T, d]."""
    z = _normalized(x, block.norm1, block.qkv_weight.dtype)
    q, k, v = _heads(block, z, 0, 3 * block.num_heads * block.head_dim).chunk(3, dim=-2)
    return _norm_heads(block.q_norm, q), _norm_heads(block.k_norm, k), v


def _heads(block: PackedBlock, z: Tensor, start: int, stop: int) -> Tensor:
    """Rows start … stop of the QKV projection of z [..., d] → [..., (stop - start) / D, D]."""
    bias = None if block.qkv_bias is None else block.qkv_bias[start:stop]
    return F.linear(z, block.qkv_weight[start:stop], bias).unflatten(-1, (-1, block.head_dim))


def _normalized(x: Tensor, norm: NormSpec, dtype: torch.dtype) -> Tensor:
    return normalize(x, norm.kind, norm.eps).to(dtype)


def _residual(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm_heads(norm: PackedNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else normalize(x, norm.spec.kind, norm.spec.eps, norm.weight, norm.bias)


def _beside(images: Tensor, prompts: Tensor) -> Tensor:
    """images [B, S, ...] and prompts [M, p, ...] → [M, B, S + p, ...]."""
    m, b = len(prompts), len(images)
    pair = images.expand(m, *images.shape), prompts[:, None].expand(m, b, *prompts.shape[1:])
    return torch.cat(pair, dim=2)
