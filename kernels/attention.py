"""Multi-head attention over short sequences whose tokens come in up to two segments.

Sequences are indexed by (m, b): one for every prompt and image. A segment is a tensor [M, B, T, H, D]; what all prompts
share is expanded along M, what all images share along B (stride 0, nothing is copied). Queries and keys are the
concatenation of their segments along T:

- first block: image tokens, shared by the prompts, and prompt tokens, shared by the images;
- middle blocks of shallow prompts: one segment;
- last block: the queries of the pooled rows alone;
- deep prompts: the prompts' keys and values as a second segment, without queries.

What runs on the device is in `hgprompt.kernels.attention_kernels`.

Letters in shapes: M prompts, B images, T queries, S keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hgprompt.kernels import attention_kernels
from hgprompt.kernels.compiler import cdiv, launch_options, next_power_of_2, on_device, precision_of
from hgprompt.kernels.operators import Operator

# Keys up to which a CPU writes the scores to memory in bfloat16: they still fit its caches.
_MATERIALIZE_UP_TO = 1024
_LOG2_E = 1.4426950408889634
ONE_PROGRAM = {"WHOLE_UP_TO": 256, "BLOCK_T": 16, "num_warps": 8, "num_stages": 1}
"""Of a row of the configurations on sm_90: dQ, dK and dV of a sequence's head come from one program. No row has it
until it is measured."""

# What plain PyTorch computes ------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v for each sequence and head, for one segment.

    Args:
        q: queries [N, T, H, D], floating point.
        k: keys [N, S, H, D], dtype of q.
        v: values [N, S, H, D], dtype of q.
        scale: factor on the scores, D**-0.5 in a standard ViT.

    Returns:
        [N, T, H·D], heads side by side as an output projection reads them.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # PyTorch's fused attention on a CPU does not reach the bfloat16 matrix units; two batched products do. On a GPU its
    # backward pass adds up in any order: in float32 not here, in 16 bits only where the caller asks PyTorch for
    # deterministic algorithms.
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= _MATERIALIZE_UP_TO
    if on_cpu or (q.is_cuda and q.dtype == torch.float32):
        out = torch.matmul(torch.matmul(q * scale, k.transpose(-1, -2)).softmax(-1), v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).flatten(2)


def segment_attention_reference(
    q1: Tensor,
    k1: Tensor,
    v1: Tensor,
    scale: float,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    one_segment: Callable[..., Tensor] = attention,
) -> Tensor:
    """The specification of `segment_attention`: the segments side by side, then `attention`, or another."""
    q, k, v = (a if b is None else torch.cat([a, b], dim=2) for a, b in ((q1, q2), (k1, k2), (v1, v2)))
    m, b = q.shape[:2]
    return one_segment(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale).unflatten(0, (m, b))


def packed_attention_reference(
    qkv: Tensor,
    scale: float,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    one_segment: Callable[..., Tensor] = attention,
) -> Tensor:
    """The specification of `packed_attention`."""
    q, k, v = qkv.unbind(3)
    return segment_attention_reference(q, k, v, scale, None, k2, v2, one_segment)


# Launchers ------------------------------------------------------------------------------------------------------------


def supported(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take heads of this width: rows of 16 bytes, at most 128 numbers."""
    return (
        dtype in (torch.float16, torch.bfloat16, torch.float32)
        and head_dim <= 128
        and head_dim * dtype.itemsize % 16 == 0
    )


class _Problem:
    """One call's tensors as the kernels read them, and the arguments that all of them share.

    An absent second segment is stood in for by the first, and not read.
    """

    def __init__(self, first: Sequence[Tensor], second: Sequence[Tensor | None]) -> None:
        q1, k1, v1 = first
        if not supported(q1.shape[4], q1.dtype):
            raise ValueError(
                f"these kernels take heads of at most 128 numbers in rows of 16 bytes, got {q1.shape[4]} {q1.dtype}"
            )
        q2, k2, v2 = (x if x is not None and x.shape[2] else None for x in second)
        self.m, self.b, self.t1, self.heads, self.width = q1.shape
        self.s1 = k1.shape[2]
        self.t2, self.s2 = (0 if x is None else x.shape[2] for x in (q2, k2))
        self.t, self.s = self.t1 + self.t2, self.s1 + self.s2
        q1, (k1, v1) = _readable(q1), _readable(k1, v1)
        q2 = q1 if q2 is None else _readable(q2)
        k2, v2 = (k1, v1) if k2 is None or v2 is None else _readable(k2, v2)
        self.tensors = q1, q2, k1, k2, v1, v2
        self.strides = tuple(stride for x in (q1, q2, k1, k2) for stride in x.stride()[:3])
        self.lengths = self.b, self.t1, self.t2, self.s1, self.s2

    def options(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments and launch options of one of the kernels."""
        q1, block_d = self.tensors[0], next_power_of_2(self.width)
        return {
            "H": self.heads, "D": self.width, "BLOCK_D": block_d, "PRECISION": precision_of(q1.dtype),
            "TWO_Q": self.t2 > 0, "TWO_K": self.s2 > 0,
        } | launch_options(f"attention_{kernel}", q1, block_d)  # fmt: skip

    def grid(self, rows: int, block: int) -> tuple[int]:
        """One program for each tile of `rows`, head and sequence."""
        return (cdiv(rows, block) * self.m * self.b * self.heads,)


def _readable(*tensors: Tensor) -> Any:
    """The tensors with heads side by side, rows on 16 bytes, and common strides; copied where they are not so."""
    x = tensors[0]
    width = x.shape[4]
    rows = (x.stride(i) * x.element_size() % 16 == 0 for i in range(3))
    good = x.stride()[3:] == (width, 1) and all(rows)
    good = good and all(y.data_ptr() % 16 == 0 and y.stride() == x.stride() for y in tensors)
    chosen = tensors if good else [y.clone(memory_format=torch.contiguous_format) for y in tensors]
    return chosen if len(tensors) > 1 else chosen[0]


def _launch_forward(x: _Problem, scale: float) -> tuple[Tensor, Tensor]:
    q1 = x.tensors[0]
    out = q1.new_empty(x.m, x.b, x.t, x.heads * x.width)
    lse = q1.new_empty(x.m, x.b, x.heads, x.t, dtype=torch.float32)
    options = x.options("forward")
    options["BLOCK_T"] = min(options["BLOCK_T"], next_power_of_2(x.t))
    with on_device(q1):
        attention_kernels.forward[x.grid(x.t, options["BLOCK_T"])](
            *x.tensors, out, lse, *x.strides, *x.lengths, scale * _LOG2_E, **options
        )
    return out, lse


def _launch_backward(
    x: _Problem, scale: float, out: Tensor, lse: Tensor, dout: Tensor,
    dq: Sequence[Tensor | None], dk: Sequence[Tensor | None], dv: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Fill gradients (first, second segment), [M, B, rows, H, D] with contiguous sequences and heads.

    A first segment that is None is left out of the work. dk and dv are needed together, or not at all.
    """
    q1 = x.tensors[0]
    dout = dout.contiguous()
    first_key, first_query = (x.s1 if dk[0] is None else 0), (x.t1 if dq[0] is None else 0)
    keys, queries = x.options("backward_keys"), x.options("backward_queries")
    keys["BLOCK_T"], queries["BLOCK_T"] = (min(o["BLOCK_T"], next_power_of_2(x.t)) for o in (keys, queries))
    whole = keys.pop("WHOLE_UP_TO") >= x.s and not first_key and not first_query and dk[0] is not None
    keys |= {"WHOLE": whole} | ({"BLOCK_S": next_power_of_2(x.s)} if whole else {})
    dq1, dq2 = _stood_in(dq, q1)
    (dk1, dk2), (dv1, dv2) = _stood_in(dk, q1), _stood_in(dv, q1)
    dq_strides = [stride for y in (dq1, dq2) for stride in y.stride()[1:3]]
    dk_strides = [stride for y in (dk1, dk2) for stride in y.stride()[1:3]]
    delta = torch.empty_like(lse)
    with on_device(q1):
        if not whole:
            block = launch_options("attention_delta", q1, keys["BLOCK_D"])
            attention_kernels.delta[x.grid(x.t, block["BLOCK"])](
                out, dout, delta, x.t, H=x.heads, D=x.width, BLOCK_D=keys["BLOCK_D"], **block
            )
        if dk[0] is not None or dk[1] is not None:
            attention_kernels.backward_keys[x.grid(x.s - first_key, keys["BLOCK_S"])](
                *x.tensors, dout, lse, delta, dk1, dk2, dv1, dv2, dq1, dq2, *x.strides, *dk_strides, *dq_strides,
                *x.lengths, first_key, scale, **keys,
            )  # fmt: skip
        if not whole and (dq[0] is not None or dq[1] is not None):
            attention_kernels.backward_queries[x.grid(x.t - first_query, queries["BLOCK_T"])](
                *x.tensors, dout, lse, delta, dq1, dq2, *x.strides, *dq_strides,
                *x.lengths, first_query, scale, **queries,
            )  # fmt: skip


def _stood_in(pair: Sequence[Tensor | None], other: Tensor) -> tuple[Tensor, Tensor]:
    """The pair, its gaps filled with a tensor that is not written."""
    known = next((y for y in pair if y is not None), other)
    first, second = (known if y is None else y for y in pair)
    return first, second


# Operators ------------------------------------------------------------------------------------------------------------

_SEGMENTS = "Tensor q1, Tensor k1, Tensor v1, Tensor? q2, Tensor? k2, Tensor? v2, float scale"
_PACKED = "Tensor qkv, Tensor? k2, Tensor? v2, float scale"


def _segment_launch(q1, k1, v1, q2, k2, v2, scale):
    return _launch_forward(_Problem((q1, k1, v1), (q2, k2, v2)), scale)


def _segment_fake(q1, k1, v1, q2, k2, v2, scale):
    m, b, t, heads, width = q1.shape
    t = t + (0 if q2 is None else q2.shape[2])
    return q1.new_empty(m, b, t, heads * width), q1.new_empty(m, b, heads, t, dtype=torch.float32)


def _segment_launch_backward(dout, out, lse, q1, k1, v1, q2, k2, v2, scale, needed):
    grads = _segment_gradients(q1, k1, v1, q2, k2, v2, needed)
    dq1, dk1, dv1, dq2, dk2, dv2 = (g if g.numel() else None for g in grads)
    _launch_backward(_Problem((q1, k1, v1), (q2, k2, v2)), scale, out, lse, dout, (dq1, dq2), (dk1, dk2), (dv1, dv2))
    return grads


def _segment_gradients(q1, k1, v1, q2, k2, v2, needed):
    """Gradients to be filled, in the order of the arguments; empty where none is needed.

    The kernels write queries, or keys and values, of the second segment alone or of both.
    """
    first_q, first_k, second_q, second_k = needed
    wanted = (first_q, first_k, first_k, first_q or second_q, first_k or second_k, first_k or second_k)
    return [
        y.new_empty(y.shape) if y is not None and want else q1.new_empty(0)
        for y, want in zip((q1, k1, v1, q2, k2, v2), wanted, strict=True)
    ]


def _segment_fake_backward(dout, out, lse, q1, k1, v1, q2, k2, v2, scale, needed):
    return _segment_gradients(q1, k1, v1, q2, k2, v2, needed)


def _segment_setup(ctx, inputs, output):
    q1, k1, v1, q2, k2, v2, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q1, k1, v1, q2, k2, v2, *output)
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _segment_backward(ctx, dout, _):
    if dout is None:
        return (None,) * 7
    q1, k1, v1, q2, k2, v2, out, lse = ctx.saved_tensors
    n = ctx.needs_input_grad
    needed = [n[0], n[1] or n[2], n[3], n[4] or n[5]]
    grads = _segment_backward_op(dout, out, lse, q1, k1, v1, q2, k2, v2, ctx.scale, needed)
    return *(g if n[i] else None for i, g in enumerate(grads)), None


_segment_op = Operator(
    "segment_attention", f"({_SEGMENTS}) -> (Tensor, Tensor)", _segment_launch, _segment_fake,
    backward=_segment_backward, setup=_segment_setup,
)  # fmt: skip
_segment_backward_op = Operator(
    "segment_attention_backward", f"(Tensor dout, Tensor out, Tensor lse, {_SEGMENTS}, bool[] needed) -> Tensor[]",
    _segment_launch_backward, _segment_fake_backward,
)  # fmt: skip


def _packed_launch(qkv, k2, v2, scale):
    return _launch_forward(_Problem(qkv.unbind(3), (None, k2, v2)), scale)


def _packed_fake(qkv, k2, v2, scale):
    m, b, t, _, heads, width = qkv.shape
    return qkv.new_empty(m, b, t, heads * width), qkv.new_empty(m, b, heads, t, dtype=torch.float32)


def _packed_launch_backward(dout, out, lse, qkv, k2, v2, scale):
    dqkv, dk2, dv2 = _packed_gradients(qkv, k2, v2)
    dq, dk, dv = dqkv.unbind(3)
    second = (dk2, dv2) if dk2.numel() else (None, None)
    _launch_backward(
        _Problem(qkv.unbind(3), (None, k2, v2)), scale, out, lse, dout, (dq, None), (dk, second[0]), (dv, second[1])
    )
    return dqkv, dk2, dv2


def _packed_gradients(qkv, k2, v2):
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(0 if y is None else y.shape) for y in (k2, v2))


def _packed_fake_backward(dout, out, lse, qkv, k2, v2, scale):
    return _packed_gradients(qkv, k2, v2)


def _packed_setup(ctx, inputs, output):
    qkv, k2, v2, scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, k2, v2, *output)
    ctx.set_materialize_grads(False)
    ctx.scale = scale


def _packed_backward(ctx, dout, _):
    if dout is None:
        return (None,) * 4
    qkv, k2, v2, out, lse = ctx.saved_tensors
    dqkv, dk2, dv2 = _packed_backward_op(dout, out, lse, qkv, k2, v2, ctx.scale)
    return dqkv, None if k2 is None else dk2, None if v2 is None else dv2, None


_packed_op = Operator(
    "packed_attention", f"({_PACKED}) -> (Tensor, Tensor)", _packed_launch, _packed_fake,
    backward=_packed_backward, setup=_packed_setup,
)  # fmt: skip
_packed_backward_op = Operator(
    "packed_attention_backward", f"(Tensor dout, Tensor out, Tensor lse, {_PACKED}) -> (Tensor, Tensor, Tensor)",
    _packed_launch_backward, _packed_fake_backward,
)  # fmt: skip


def segment_attention(
    q1: Tensor, k1: Tensor, v1: Tensor, scale: float,
    q2: Tensor | None = None, k2: Tensor | None = None, v2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ) v, where queries, keys and values are two segments side by side (Triton).

    Args:
        q1, k1, v1: first segment, [M, B, T1, H, D] and twice [M, B, S1, H, D], of a D and dtype that are `supported`.
        scale: factor on the scores.
        q2, k2, v2: second segment, with T2 and S2 rows; None or no rows: there is none. Tensors that are expanded along
            M or B are read where they lie.

    Returns:
        [M, B, T1 + T2, H·D], heads side by side. Differentiable once in every tensor; only what is needed is computed,
        without atomics, so the same input gives the same bits.
    """
    out: Tensor = _segment_op(q1, k1, v1, q2, k2, v2, scale)[0]
    return out


def packed_attention(qkv: Tensor, scale: float, k2: Tensor | None = None, v2: Tensor | None = None) -> Tensor:
    """`segment_attention` of one segment as the QKV projection leaves it, [M, B, T, 3, H, D], whose gradient is packed
    in the same way; optionally with further keys and values [M, B, S2, H, D] (deep prompts).

    Raises:
        ValueError: heads or a dtype that are not `supported`, here and in `segment_attention`.
    """
    out: Tensor = _packed_op(qkv, k2, v2, scale)[0]
    return out
