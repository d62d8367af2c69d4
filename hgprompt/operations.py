"""The operations that the network is made of, as sets to choose from: plain PyTorch, and kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hgprompt.errors import OptionError
from hgprompt.kernels import attention, compiler, mlp, norm

if TYPE_CHECKING:
    from hgprompt.backbone import FrozenViT

Impl = Literal["auto", "reference", "triton", "sdpa", "xformers"]


@dataclass(frozen=True)
class Operations:
    """One implementation of each operation; the specifications are the `_reference` functions of `hgprompt.kernels`."""

    name: str
    segment_attention: Callable[..., Tensor]
    packed_attention: Callable[..., Tensor]
    residual: Callable[[Tensor], Tensor]
    add_normalize: Callable[..., tuple[norm.Stream, Tensor]]
    mlp: Callable[..., Tensor]


REFERENCE = Operations(
    "reference",
    attention.segment_attention_reference,
    attention.packed_attention_reference,
    norm.residual_reference,
    norm.add_normalize_reference,
    mlp.mlp_reference,
)
TRITON = Operations(
    "triton",
    attention.segment_attention,
    attention.packed_attention,
    norm.residual,
    norm.add_normalize,
    mlp.mlp,
)


def select(vit: FrozenViT, impl: Impl) -> Operations:
    """The operations for a backbone's device, dtype and head width.

    Args:
        impl: "reference": plain PyTorch. "triton": this project's kernels. "sdpa", "xformers": the kernels, with
            PyTorch's or xformers' attention. "auto": "triton" on a GPU from sm_80 on in float16 or bfloat16, else
            "reference".

    Raises:
        OptionError: no such implementation, or it cannot run here; the message says why.
    """
    if impl == "auto":
        low = vit.dtype in (torch.float16, torch.bfloat16)
        return TRITON if vit.device.type == "cuda" and low and _obstacle(vit) is None else REFERENCE
    if impl == "reference":
        return REFERENCE
    if impl not in ("triton", "sdpa", "xformers"):
        raise OptionError(f"impl must be 'auto', 'reference', 'triton', 'sdpa' or 'xformers', got {impl!r}")
    obstacle = _obstacle(vit)
    if obstacle is not None:
        raise OptionError(f"impl={impl!r} cannot run {vit.name} here: {obstacle}; impl='reference' can")
    if impl == "triton":
        return TRITON
    other = attention.attention if impl == "sdpa" else _xformers_attention()
    return dataclasses.replace(
        TRITON,
        name=impl,
        segment_attention=functools.partial(attention.segment_attention_reference, one_segment=other),
        packed_attention=functools.partial(attention.packed_attention_reference, one_segment=other),
    )


def _obstacle(vit: FrozenViT) -> str | None:
    """Why the kernels cannot run this backbone where it is, or None."""
    if not compiler.available(vit.device):
        return f"Triton's kernels need a GPU from sm_80 on, the backbone is on {vit.device}"
    if not attention.supported(vit.head_dim, vit.dtype):
        return (
            "the kernels take float16, bfloat16 or float32 and heads of at most 128 numbers in rows of 16 bytes, got "
            f"{vit.dtype} and {vit.head_dim}"
        )
    return None


def _xformers_attention() -> Callable[..., Any]:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise OptionError("impl='xformers' needs the package xformers: pip install 'hgprompt[xformers]'") from error

    def one_segment(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out: Tensor = memory_efficient_attention(q, k, v, scale=scale)
        return out.flatten(2)

    return one_segment
