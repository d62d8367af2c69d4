"""A block of a timm VisionTransformer as weights, with all that frozen weights allow to fold.

The affine part of each LayerNorm goes into the linear layer that follows it, LayerScale into the one before it, and
QuickGELU becomes SiLU (quick_gelu(x) = silu(1.702 x) / 1.702). What computes something else than these classes do is
refused: the encoder would not compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from hgprompt.errors import BackboneError
from hgprompt.kernels.activation import Activation
from hgprompt.kernels.norm import NormKind

QUICK_GELU_SLOPE = 1.702
_ACTIVATIONS: dict[str, Activation | Literal["quick_gelu"]] = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
    "SiLU": "silu",
    "Swish": "silu",
    "ReLU": "relu",
}

_Linear = tuple[Tensor, "Tensor | None"]


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
            refuse(f"{where}.attn", "its attention output is gated, which the encoder does not compute")
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
            refuse(f"{where}.mlp", "QuickGELU together with a gated or normalised MLP is not supported")
        weight, bias = fc1
        fc1 = weight * QUICK_GELU_SLOPE, None if bias is None else bias * QUICK_GELU_SLOPE
        return fc1, (fc2[0] / QUICK_GELU_SLOPE, fc2[1]), "silu"


def refuse(where: str, reason: str) -> NoReturn:
    raise BackboneError(f"cannot pack {where}: {reason}. Supported: timm's VisionTransformer with standard blocks")


def overrides(module: nn.Module, base: type, methods: tuple[str, ...]) -> str | None:
    return next((m for m in methods if getattr(type(module), m) is not getattr(base, m)), None)


def _require_class(module: nn.Module, expected: str, where: str) -> None:
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    base: type = {"Block": Block, "Attention": Attention}[expected]
    if not isinstance(module, base) or overrides(module, base, ("forward",)):
        refuse(where, f"{type(module).__name__} is not timm's {expected}")


def _require_own_forward_of_a_library(module: nn.Module, where: str) -> None:
    """Refuse a subclass from elsewhere that computes something of its own, low-rank updates for example."""
    if not type(module).forward.__module__.startswith(("torch.nn.", "timm.")):
        refuse(where, f"{type(module).__name__} computes its own forward()")


def _norm_spec(norm: nn.Module, where: str) -> NormSpec:
    from timm.layers import RmsNorm

    _require_own_forward_of_a_library(norm, where)
    if isinstance(norm, nn.LayerNorm):
        return NormSpec("layer", norm.eps)
    if isinstance(norm, (RmsNorm, nn.RMSNorm)):
        eps = norm.eps
        return NormSpec("rms", float(eps) if eps is not None else torch.finfo(torch.float32).eps)
    refuse(where, f"{type(norm).__name__} is neither LayerNorm nor RMSNorm")


def _optional_norm(norm: nn.Module, where: str) -> PackedNorm | None:
    return None if isinstance(norm, nn.Identity) else PackedNorm(norm, where)


def _linear(layer: nn.Module, where: str) -> _Linear:
    """Weight and bias in float64."""
    if not isinstance(layer, nn.Linear):
        refuse(where, f"{type(layer).__name__} is not Linear; merge adapters into the weights first")
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
    if not isinstance(layer_scale, LayerScale) or overrides(layer_scale, LayerScale, ("forward",)):
        refuse(where, f"{type(layer_scale).__name__} is not timm's LayerScale")
    gamma = layer_scale.gamma.detach().double()
    return weight * gamma[:, None], None if bias is None else bias * gamma


def _mlp_weights(mlp: Any, where: str) -> tuple[_Linear, _Linear, Any, bool]:
    """Both linear layers, the activation, and whether the first is gated (gate rows first)."""
    from timm.layers import GluMlp, Mlp, SwiGLU

    kind = type(getattr(mlp, "act", None))
    activation = _ACTIVATIONS.get(kind.__name__)
    if activation is None or not kind.__module__.startswith(("torch.nn.", "timm.")):
        refuse(f"{where}.act", f"activation {kind.__name__} is none of {', '.join(_ACTIVATIONS)} of torch and timm")
    if activation == "gelu" and getattr(mlp.act, "approximate", "none") == "tanh":
        activation = "gelu_tanh"
    if isinstance(mlp, SwiGLU) and not overrides(mlp, SwiGLU, ("forward",)):
        gate, value = _linear(mlp.fc1_g, f"{where}.fc1_g"), _linear(mlp.fc1_x, f"{where}.fc1_x")
    elif isinstance(mlp, GluMlp) and not overrides(mlp, GluMlp, ("forward",)):
        weight, bias = _linear(mlp.fc1, f"{where}.fc1")
        halves = list(zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2), strict=True))
        value, gate = halves if mlp.gate_last else halves[::-1]
    elif isinstance(mlp, Mlp) and not overrides(mlp, Mlp, ("forward",)):
        return _linear(mlp.fc1, f"{where}.fc1"), _linear(mlp.fc2, f"{where}.fc2"), activation, False
    else:
        refuse(where, f"{type(mlp).__name__} is none of timm's Mlp, GluMlp, SwiGLU")
    bias = None if gate[1] is None or value[1] is None else torch.cat([gate[1], value[1]])
    return (torch.cat([gate[0], value[0]]), bias), _linear(mlp.fc2, f"{where}.fc2"), activation, True
