"""Launch options tried on the GPU at hand: python benchmarks/gpu_tune.py out.json [--seconds 100] [--rehearse]

A bounded sweep over a few good candidates for each kernel of the paper's setting (bfloat16, heads of 64), the shipped
row first. What is faster by more than 3 % is proposed: nothing is written into kernels/configurations.json.

Compiling a candidate takes a second to several, timing it a fraction of one: half of the time goes to processes that
compile side by side (--compile I/N: every N-th candidate), and leave the kernels in Triton's cache.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from gpu_common import DEVICE, DTYPE, HEAD_DIM, HEADS, IMAGE_TOKENS, INNER, M, REHEARSE, TOKENS, WIDTH  # isort: skip
from gpu_common import instead, keep, median_ms, provenance, row_in_use  # isort: skip

from hgprompt.kernels import mlp

SECONDS = float(sys.argv[sys.argv.index("--seconds") + 1]) if "--seconds" in sys.argv else 100.0
COMPILE = sys.argv[sys.argv.index("--compile") + 1] if "--compile" in sys.argv else ""
IMAGES = 2 if REHEARSE else 16
T = IMAGE_TOKENS + TOKENS
BITS = 8 * DTYPE.itemsize


def grid(**values) -> list[dict[str, int]]:
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


CANDIDATES = {
    "attention_forward": grid(BLOCK_T=(64, 128), BLOCK_S=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)),
    "attention_backward_keys": [
        *grid(BLOCK_T=(16, 32), BLOCK_S=(64,), WHOLE_UP_TO=(256,), num_warps=(8,), num_stages=(1, 2)),
        *grid(BLOCK_T=(32,), BLOCK_S=(64, 128), WHOLE_UP_TO=(0,), num_warps=(4, 8), num_stages=(1, 2, 3)),
        *grid(BLOCK_T=(64,), BLOCK_S=(64,), WHOLE_UP_TO=(0,), num_warps=(4, 8), num_stages=(1, 2, 3)),
        *grid(BLOCK_T=(64,), BLOCK_S=(128,), WHOLE_UP_TO=(0,), num_warps=(8,), num_stages=(1, 2, 3)),
    ],
    "attention_backward_queries": [
        *grid(BLOCK_T=(64,), BLOCK_S=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3)),
        *grid(BLOCK_T=(128,), BLOCK_S=(32, 64), num_warps=(4, 8), num_stages=(1, 2, 3)),
        *grid(BLOCK_T=(128,), BLOCK_S=(128,), num_warps=(8,), num_stages=(1, 2, 3)),
    ],
    "normalize": grid(BLOCK=(1, 2, 4, 8), num_warps=(2, 4, 8), num_stages=(1,)),
    "normalize_backward": grid(BLOCK=(1, 2, 4, 8), num_warps=(2, 4, 8), num_stages=(1,)),
    "activate": grid(BLOCK=(512, 1024, 2048, 4096), num_warps=(4, 8), num_stages=(1,)),
    "linear": grid(BLOCK_M=(128,), BLOCK_N=(128,), BLOCK_K=(32, 64), GROUP=(8,), num_warps=(8,), num_stages=(3, 4)),
}
"""Those that spill registers on sm_90 were left out: larger tiles, and large ones with four warps."""


def workloads() -> dict[str, object]:
    """A call that the kernel of this name dominates, at the paper's shapes."""
    qkv = torch.randn(M, IMAGES, T, 3, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    out, lse = torch.ops.hgprompt.packed_attention(qkv, None, None, HEAD_DIM**-0.5)
    rows = M * IMAGES * T
    x, y = torch.randn(rows, WIDTH, device=DEVICE), torch.randn(rows, WIDTH, device=DEVICE, dtype=DTYPE)
    z, rstd = torch.ops.hgprompt.add_normalize(x, y, True, 1e-6, DTYPE)[1:]
    w1, w2 = (torch.randn(s, device=DEVICE, dtype=DTYPE) / 30 for s in ((INNER, WIDTH), (WIDTH, INNER)))
    bias = torch.randn(INNER, device=DEVICE, dtype=DTYPE)
    pre, inner = (torch.randn(rows, INNER, device=DEVICE, dtype=DTYPE) for _ in range(2))
    ops = torch.ops.hgprompt

    def both_ways():
        hidden = mlp._launch_linear(y, w1, False, bias, "gelu", inner, False)
        return mlp._launch_linear(y, w2, True, None, "gelu", hidden, True)

    def backward():
        return ops.packed_attention_backward(out, out, lse, qkv, None, None, HEAD_DIM**-0.5)

    return {
        "attention_forward": lambda: ops.packed_attention(qkv, None, None, HEAD_DIM**-0.5),
        "attention_backward_keys": backward,
        "attention_backward_queries": backward,
        "normalize": lambda: ops.add_normalize(x, y, True, 1e-6, DTYPE),
        "normalize_backward": lambda: ops.add_normalize_backward(x, z, z, rstd, True, torch.float32, DTYPE),
        "activate": lambda: mlp._launch_activate(pre, inner, "gelu", False),
        "linear": both_ways,
    }


def plan() -> Iterator[tuple[str, dict[str, int], list[dict[str, int]]]]:
    """Every kernel, its row in use, and what to try in its place: first what is there."""
    for kernel, candidates in CANDIDATES.items():
        width = {"activate": 0, "linear": 0}.get(kernel, HEAD_DIM if "attention" in kernel else WIDTH)
        bits = 32 if kernel.startswith("normalize") else BITS  # chosen by the residual stream, which is float32
        row = row_in_use(kernel, bits, width)
        shipped = {k: v for k, v in row.items() if k not in ("bits", "width")}
        yield kernel, row, [shipped, *(c for c in candidates if c != shipped)][: 2 if REHEARSE else None]


def compile_share(rank: int, world: int) -> None:
    """Call each kernel once with every world-th of the candidates."""
    calls = workloads()
    everything = [(kernel, row, options) for kernel, row, tried in plan() for options in tried]
    for kernel, row, options in everything[rank::world]:
        with instead(row, options), contextlib.suppress(Exception):  # too much shared memory: the sweep tells
            calls[kernel]()


def compile_all(seconds: float) -> None:
    """All candidates, in as many processes as cores allow; what is not ready in time is compiled in the sweep."""
    world = 2 if REHEARSE else max(1, min(8, (os.cpu_count() or 1) - 2))
    command = [sys.executable, *sys.argv, "--compile"]
    processes = [subprocess.Popen([*command, f"{rank}/{world}"]) for rank in range(world)]
    end = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        process.wait()


def main() -> None:
    torch.manual_seed(0)
    if COMPILE:
        compile_share(*map(int, COMPILE.split("/")))
        return
    record = provenance() | {"tried": {}, "proposed": {}}
    began = time.monotonic()
    compile_all(SECONDS / 2)
    record["seconds of compiling ahead"] = time.monotonic() - began
    calls = workloads()
    share = (SECONDS - record["seconds of compiling ahead"]) / len(CANDIDATES)
    for kernel, row, candidates in plan():
        end, tried = time.monotonic() + share, []
        for options in candidates:
            if time.monotonic() > end:
                break
            with instead(row, options):
                try:
                    tried.append({"ms": median_ms(calls[kernel], rounds=10), **options})
                except Exception as error:  # too much shared memory, say
                    tried.append({"failed": f"{error!r:.120}", **options})
        record["tried"][kernel] = tried
        good = [t for t in tried if "ms" in t]
        if good:
            best = min(good, key=lambda t: t["ms"])
            first = tried[0].get("ms")
            print(f"{kernel:28} {len(tried):3} tried, shipped {first} ms, best {best}", flush=True)
            if first is None or best["ms"] < 0.97 * first:
                record["proposed"][kernel] = best
        keep(record)


if __name__ == "__main__":
    main()
