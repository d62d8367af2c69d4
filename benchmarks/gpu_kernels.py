"""Each kernel beside its floor and beside the library: python benchmarks/gpu_kernels.py out.json [--rehearse]

The floor is the larger of its operations at the rate of the library's products and its bytes at the rate of a copy,
both measured in the same run. Errors are relative, against float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from gpu_common import DEVICE, DTYPE, HEAD_DIM, HEADS, IMAGE_TOKENS, INNER, TOKENS, WIDTH, B, M

from gpu_common import REHEARSE, ceilings, difference, end_if_lost, instead, keep, median_ms  # isort: skip
from gpu_common import provenance, row_in_use  # isort: skip
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgprompt.kernels import attention, compiler, linear, mlp, norm

IMAGES = B if REHEARSE else 16  # with 13 prompts: 208 sequences, a good load for a GPU
T = IMAGE_TOKENS + TOKENS
SCALE = HEAD_DIM**-0.5


def random(*shape, dtype=DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def with_gradient(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> tuple[Callable, Callable]:
    """(forward alone, forward and backward) of a function of the leaves."""
    slope = torch.randn_like(function(*leaves))

    def forward():
        with torch.no_grad():
            return function(*leaves)

    def both():
        fresh = [x.detach().requires_grad_() for x in leaves]
        return torch.autograd.grad(function(*fresh), fresh, slope)

    return forward, both


def errors(function, reference, leaves) -> tuple[float, float]:
    """Of the output, and the largest of a gradient."""
    slope = torch.randn_like(function(*leaves))

    def run(f, *leaves):
        fresh = [x.detach().requires_grad_() for x in leaves]
        out = f(*fresh)
        return out.detach(), *torch.autograd.grad(out, fresh, slope.to(out.dtype))

    found, exact = run(function, *leaves), run(reference, *(x.double() for x in leaves))
    output, *gradients = (difference(f, e) for f, e in zip(found, exact, strict=True))
    return output, max(gradients)


class Table:
    """Rows of figures; each is printed and kept as it comes."""

    def __init__(self) -> None:
        self.record = provenance() | {"ceilings": ceilings(M * IMAGES * T), "kernels": []}
        found = self.record["ceilings"]
        self.rate = max(v for k, v in found.items() if "TFLOP" in k)
        self.bandwidth = found["copy GB/s"]
        print(found, flush=True)

    def add(self, name: str, kind: str, function: Callable[[], object], flop: float, size: float, err=None) -> None:
        try:
            ms = median_ms(function)
        except Exception as failure:  # one kernel that does not run must not lose the others' figures
            self.fail(name, kind, failure)
            return
        floor = max(flop / self.rate / 1e9, size / self.bandwidth / 1e6)
        row = {"name": name, "kind": kind, "ms": ms, "floor_ms": floor, "share_of_floor": floor / ms,
               "TFLOP/s": flop / ms / 1e9, "GB/s": size / ms / 1e6, "relative_error": err}  # fmt: skip
        self.record["kernels"].append(row)
        print(f"{name:44} {kind:8} {ms:8.3f} ms  floor {floor:8.3f}  share {floor / ms:5.2f}", flush=True)
        keep(self.record)

    def fail(self, name: str, kind: str, failure: Exception) -> None:
        self.record["kernels"].append({"name": name, "kind": kind, "failed": f"{failure!r:.300}"})
        print(f"{name:44} {kind:8} failed: {failure!r:.100}", flush=True)
        keep(self.record)
        end_if_lost(failure)


def attentions(table: Table) -> None:
    n = M * IMAGES
    element = DTYPE.itemsize

    def cost(queries, keys, sequences=n):
        flop = 4 * sequences * HEADS * queries * keys * HEAD_DIM
        return flop, sequences * HEADS * HEAD_DIM * element * (2 * queries + 2 * keys)

    def measure(name, function, reference, leaves, queries, keys, back=1.0, shared=0):
        """back: share of the backward pass that is needed. shared: bytes read once and not for every sequence."""
        flop, size = cost(queries, keys)
        size -= shared
        try:
            forward, both = with_gradient(function, leaves)
            ahead, back_error = (None, None) if reference is None else errors(function, reference, leaves)
        except Exception as failure:
            table.fail(name, "both", failure)
            return
        table.add(name, "forward", forward, flop, size, ahead)
        table.add(name, "both", both, flop * (1 + 2.5 * back), size * (1 + 2 * back), back_error)

    qkv = random(M, IMAGES, T, 3, HEADS, HEAD_DIM)
    packed = functools.partial(attention.packed_attention, scale=SCALE)
    plain = functools.partial(attention.packed_attention_reference, scale=SCALE)
    measure("attention, middle block", packed, plain, [qkv], T, T)
    if DEVICE == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

            def library(x, backend=backend):
                with sdpa_kernel(backend):
                    return plain(x)

            measure(f"attention, middle block, {backend.name}", library, None, [qkv], T, T)
    images = [random(IMAGES, IMAGE_TOKENS, HEADS, HEAD_DIM) for _ in range(3)]
    prompts = [random(M, TOKENS, HEADS, HEAD_DIM) for _ in range(3)]

    def first(function):
        def run(*leaves):
            shared = [x.to(leaves[0].dtype).expand(M, *x.shape) for x in images]
            return function(*shared, SCALE, *(x[:, None].expand(M, IMAGES, *x.shape[1:]) for x in leaves))

        return run

    # Only the prompts' rows get a gradient: their share of the queries, and of the keys.
    measure("attention, first block", first(attention.segment_attention), first(attention.segment_attention_reference),
            prompts, T, T, back=2 * TOKENS / T,
            shared=3 * HEADS * HEAD_DIM * element * (n * T - IMAGES * IMAGE_TOKENS - M * TOKENS))  # fmt: skip

    def deep(function):
        return lambda x, k, v: function(x, SCALE, *(y[:, None].expand(M, IMAGES, *y.shape[1:]) for y in (k, v)))

    tokens = random(M, IMAGES, IMAGE_TOKENS, 3, HEADS, HEAD_DIM)
    measure("attention, middle block, deep prompts", deep(attention.packed_attention),
            deep(attention.packed_attention_reference), [tokens, *prompts[1:]], IMAGE_TOKENS, T,
            shared=2 * HEADS * HEAD_DIM * element * (n - M) * TOKENS)  # fmt: skip
    q, k, v = (random(M, IMAGES, t, HEADS, HEAD_DIM) for t in (1, T, T))
    measure("attention, last block", lambda *x: attention.segment_attention(*x, SCALE),
            lambda *x: attention.segment_attention_reference(*x, SCALE), [q, k, v], 1, T)  # fmt: skip
    # Last, since it is the least tried. dQ, dK, dV from one program: on sm_90 it does not spill (the compile report
    # says so); on sm_80 it does.
    if DEVICE != "cuda" or compiler.architecture(torch.device(DEVICE)) == "sm_90":
        with instead(row_in_use("attention_backward_keys", 8 * element, HEAD_DIM), attention.ONE_PROGRAM):
            measure("attention, middle block, one program", packed, plain, [qkv], T, T)


def norms(table: Table) -> None:
    rows = M * IMAGES * T
    for stream in (torch.float32, DTYPE):
        x, y = norm.Stream(random(rows, WIDTH, dtype=stream)), random(rows, WIDTH)
        if stream == DTYPE:
            x = norm.Stream(x.high, x.high / 512)
        wide, narrow = rows * WIDTH * stream.itemsize, rows * WIDTH * DTYPE.itemsize
        tensors = 2 if stream == DTYPE else 1  # of the stream, forward; back it is one
        for name, function in (("ours", norm.add_normalize), ("PyTorch", norm.add_normalize_reference)):

            def forward(function=function, x=x, y=y):
                with torch.no_grad():
                    return function(x, y, "layer", 1e-6, DTYPE)

            leaves = [x.high.detach().requires_grad_(), y.detach().requires_grad_()]
            total, z = function(norm.Stream(leaves[0], x.low), leaves[1], "layer", 1e-6, DTYPE)
            slopes = [torch.randn_like(total.high), torch.randn_like(z)]

            def backward(total=total, z=z, leaves=leaves, slopes=slopes):
                return torch.autograd.grad((total.high, z), leaves, slopes, retain_graph=True)

            label = f"add and normalise, stream of {tensors} x {stream}, {name}"
            table.add(label, "forward", forward, 0, 2 * tensors * wide + 2 * narrow)
            table.add(label, "backward", backward, 0, 2 * wide + (2 if stream == DTYPE else 3) * narrow)


def mlps(table: Table) -> None:
    rows = M * IMAGES * T
    x = random(rows, WIDTH)
    w1, w2 = random(INNER, WIDTH) / WIDTH**0.5, random(WIDTH, INNER) / INNER**0.5
    b1, b2 = random(INNER), random(WIDTH)
    flop = 4 * rows * WIDTH * INNER
    for activation in ("gelu", "silu"):
        forms = {
            "PyTorch": lambda t, a=activation: mlp.mlp_reference(t, w1, b1, w2, b2, a, False),
            "library": lambda t, a=activation: mlp.mlp(t, w1, b1, w2, b2, a),
        }
        if linear.available(x, WIDTH, INNER):
            forms["fused"] = lambda t, a=activation: mlp.mlp(t, w1, b1, w2, b2, a, form="fused")
        for name, function in forms.items():

            def exact(t, a=activation):
                return mlp.mlp_reference(t, *(w.double() for w in (w1, b1, w2, b2)), a, False)

            try:
                forward, both = with_gradient(function, [x])
                ahead, back = errors(function, exact, [x[:20480]])  # a dozen tiles for each of a GPU's programs
            except Exception as failure:
                table.fail(f"MLP, {activation}, {name}", "both", failure)
                continue
            table.add(f"MLP, {activation}, {name}", "forward", forward, flop, 2 * rows * WIDTH * DTYPE.itemsize, ahead)
            table.add(f"MLP, {activation}, {name}", "both", both, 2 * flop, 0, back)


def main() -> None:
    torch.manual_seed(0)
    table = Table()
    attentions(table)
    norms(table)
    mlps(table)


if __name__ == "__main__":
    main()
