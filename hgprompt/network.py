"""The network: image tokens × prompts → features, for one micro-batch.

What computes is left to a set of operations (`hgprompt.operations`): plain PyTorch, which is the specification and
runs on a CPU, or kernels. This page is the order in which they follow one another, the same for all.

Work that is not done, exactly:
- first block: LayerNorm and QKV of the image tokens are shared by all prompts, those of the prompts by all images;
- last block: only the rows that are pooled get a query, a projection and an MLP (for a CLS feature: one row);
- deep prompts: what a block makes of its prompt tokens is thrown away, so they are keys and values alone;
- frozen weights get no gradient, and neither do the image tokens before they have met a prompt.

The residual stream has more bits than a compute dtype below float32 (`hgprompt.kernels.norm`): it costs little memory
traffic and saves the error of 24 roundings.

Letters in shapes: M prompts, B images, S image tokens (prefix and patches), p prompt tokens, H heads, D head width.
Prompt tokens stand after the image tokens here; attention has no order, so the feature is that of [CLS; P; patches].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels.mlp import hidden
from hgprompt.kernels.norm import Stream, normalize

if TYPE_CHECKING:
    from hgprompt.backbone import FrozenViT
    from hgprompt.operations import Operations
    from hgprompt.packing import NormSpec, PackedBlock, PackedNorm


@dataclass(frozen=True)
class ImageTokens:
    """What no prompt touches of a few images: tokens at the first block, and their queries, keys, values there.

    All prompts share the images [B, ...], or each prompt has its own [M, B, ...].
    """

    x: Tensor  # [B, S, d]          or [M, B, S, d]
    q: Tensor  # [B, S, H, D]       or [M, B, S, H, D]
    k: Tensor  # [B, S, H, D]       or [M, B, S, H, D]
    v: Tensor  # [B, S, H, D]       or [M, B, S, H, D]

    def of_each_prompt(self, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [M, B, S, d] and q, k, v [M, B, S, H, D]; what is shared is expanded, not copied."""
        shared = self.x.ndim == 3
        x, q, k, v = (t.expand(m, *t.shape) if shared else t for t in (self.x, self.q, self.k, self.v))
        return x, q, k, v


def embed(vit: FrozenViT, images: Tensor, ops: Operations) -> ImageTokens:
    """Prepared images [B, C, H, W] or [M, B, C, H, W] → the part of the first block that no prompt touches."""
    block = vit.blocks[0]
    x = ops.residual(vit.norm_pre(vit.embed(images.flatten(0, -4)).unflatten(0, images.shape[:-3])))
    return ImageTokens(x, *_separate(block, _qkv(block, _normalized(x, block.norm1, block, ops))))


def features(vit: FrozenViT, tokens: ImageTokens, prompts: Tensor, ops: Operations) -> Tensor:
    """Features of every image under every prompt (Eq. 3).

    Args:
        vit: the packed backbone.
        tokens: of B images, or of B images for each prompt, from `embed`.
        prompts: [M, p, d] shallow or [M, L, p, d] deep, in the backbone's dtype and device.
        ops: what computes them.

    Returns:
        [M, B, h] in the backbone's dtype; differentiable in the prompts.
    """
    deep = prompts.ndim == 4
    rows = tokens.x.shape[-2]
    # x is the residual stream, y what the last MLP has yet to add to it: the next norm adds and normalises in one go.
    x, y = _first_block(vit, tokens, prompts[:, 0] if deep else prompts, deep, ops)
    for i, block in enumerate(vit.blocks[1:], start=1):
        last = i == vit.depth - 1
        if last and vit.pool == "token":
            rows = 1
        x, y = _block(block, x, y, rows if last else y.shape[2], prompts[:, i] if deep else None, ops)
    m, b = y.shape[:2]
    pooled = x.first(rows).value() + y[:, :, :rows]
    return vit.pooled(pooled.flatten(0, 1).to(vit.dtype)).unflatten(0, (m, b))


def _first_block(
    vit: FrozenViT, tokens: ImageTokens, prompts: Tensor, deep: bool, ops: Operations
) -> tuple[Stream, Tensor]:
    """x and y [M, B, T, d], T = S + p, or S for deep prompts, whose own outputs are not needed."""
    block = vit.blocks[0]
    m, b = len(prompts), tokens.x.shape[-3]
    prompts = ops.residual(vit.norm_pre(prompts))
    of_prompts = _separate(block, _qkv(block, _normalized(prompts, block.norm1, block, ops)))
    q2, k2, v2 = (t[:, None].expand(m, b, *t.shape[1:]) for t in of_prompts)
    x, q1, k1, v1 = tokens.of_each_prompt(m)
    if not deep:
        x = torch.cat([x, prompts[:, None].expand(m, b, *prompts.shape[1:])], dim=2)
    mixed = ops.segment_attention(q1, k1, v1, block.scale, None if deep else q2, k2, v2)
    return _project_and_mlp(block, Stream(x), mixed, ops)


def _block(
    block: PackedBlock, x: Stream, y: Tensor, rows: int, prompts: Tensor | None, ops: Operations
) -> tuple[Stream, Tensor]:
    """A later block on x + y [M, B, T, d] → its first `rows` tokens' x and y; prompts: deep ones' tokens here."""
    m, b, t, _ = y.shape
    x, z = ops.add_normalize(x, y, block.norm1.kind, block.norm1.eps, block.qkv_weight.dtype)
    k2 = v2 = None
    if prompts is not None:
        of_prompts = _separate(block, _qkv(block, _normalized(ops.residual(prompts), block.norm1, block, ops)))
        k2, v2 = (u[:, None].expand(m, b, *u.shape[1:]) for u in of_prompts[1:])
    if rows == t and block.q_norm is None and block.k_norm is None:
        mixed = ops.packed_attention(_qkv(block, z), block.scale, k2, v2)
    else:
        if rows == t:
            q1, k1, v1 = _separate(block, _qkv(block, z))
        else:
            x = x.first(rows)
            q1 = _norm_heads(block.q_norm, _qkv(block, z[:, :, :rows], 0, 1)[..., 0, :, :])
            k1, v1 = _keys_and_values(block, *_qkv(block, z, 1, 3).unbind(-3))
        mixed = ops.segment_attention(q1, k1, v1, block.scale, None, k2, v2)
    return _project_and_mlp(block, x, mixed, ops)


def _project_and_mlp(block: PackedBlock, x: Stream, mixed: Tensor, ops: Operations) -> tuple[Stream, Tensor]:
    y = F.linear(_norm_heads(block.attn_norm, mixed), block.proj_weight, block.proj_bias)
    x, z = ops.add_normalize(x, y, block.norm2.kind, block.norm2.eps, block.fc1_weight.dtype)
    if block.mlp_norm is None:
        return x, ops.mlp(
            z, block.fc1_weight, block.fc1_bias, block.fc2_weight, block.fc2_bias, block.activation, block.gated
        )
    z = _norm_heads(block.mlp_norm, hidden(z, block.fc1_weight, block.fc1_bias, block.activation, block.gated))
    return x, F.linear(z, block.fc2_weight, block.fc2_bias)


def _qkv(block: PackedBlock, z: Tensor, start: int = 0, stop: int = 3) -> Tensor:
    """Projections `start` … `stop` of (queries, keys, values) of z [..., d] → [..., stop - start, H, D]."""
    width = block.num_heads * block.head_dim
    part = slice(start * width, stop * width)
    bias = None if block.qkv_bias is None else block.qkv_bias[part]
    return F.linear(z, block.qkv_weight[part], bias).unflatten(-1, (stop - start, block.num_heads, block.head_dim))


def _separate(block: PackedBlock, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., 3, H, D] → queries, keys, values [..., H, D], with their norms if the network has them."""
    q, k, v = qkv.unbind(-3)
    return _norm_heads(block.q_norm, q), *_keys_and_values(block, k, v)


def _keys_and_values(block: PackedBlock, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys with their norm; values in the same layout, since attention would copy both in every pass if they differed,
    and once for every prompt where images share them."""
    return (k, v) if block.k_norm is None else (_norm_heads(block.k_norm, k), v.contiguous())


def _normalized(x: Tensor, norm: NormSpec, block: PackedBlock, ops: Operations) -> Tensor:
    return ops.add_normalize(Stream(x), None, norm.kind, norm.eps, block.qkv_weight.dtype)[1]


def _norm_heads(norm: PackedNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else normalize(x, norm.spec.kind, norm.spec.eps, norm.weight, norm.bias)
