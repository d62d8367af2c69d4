"""Multi-head attention over short sequences.

Layout of every argument: B sequences, T queries, S keys, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys up to which a CPU writes the scores to memory in bfloat16: they still fit its caches.
_MATERIALIZE_UP_TO = 1024


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v for each sequence and head.

    Args:
        q: queries [B, T, H, D], floating point.
        k: keys [B, S, H, D], dtype of q.
        v: values [B, S, H, D], dtype of q.
        scale: factor on the scores, D**-0.5 in a standard ViT.

    Returns:
        [B, T, H·D], heads side by side as an output projection reads them.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= _MATERIALIZE_UP_TO:
        # PyTorch's fused attention on a CPU does not reach the bfloat16 matrix units; two batched products do.
        out = torch.matmul(torch.matmul(q * scale, k.transpose(-1, -2)).softmax(-1), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)
