"""Launch options tried on the GPU at hand: python benchmarks/gpu_tune.py out.json [--rehearse]

A sweep over a few good candidates for each kernel of the paper's setting (bfloat16, heads of 64), the shipped row
first, and every candidate's results beside that row's. Nothing is written into kernels/configurations.json: its rows
are chosen from what this prints. Compiling a candidate takes seconds, timing it a fraction of one: once the shipped
rows are timed, the others are compiled in processes side by side.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from gpu_common import DEVICE, DTYPE, HEAD_DIM, HEADS, IMAGE_TOKENS, INNER, M, TOKENS, WIDTH  # isort: skip
from gpu_common import REHEARSE, difference, end_if_lost, instead, keep, median_ms  # isort: skip
from gpu_common import provenance, row_in_use  # isort: skip

from hgprompt.kernels import activation, attention, compiler, linear, norm

IMAGES, T, SCALE = (2 if REHEARSE else 16), IMAGE_TOKENS + TOKENS, HEAD_DIM**-0.5


def tiles(*names: str) -> Callable[..., Iterator[dict[str, int]]]:
    """Rows of launch options from tuples of numbers, the last two of which are warps and stages."""
    return lambda *rows: (dict(zip((*names, "num_warps", "num_stages"), row, strict=True)) for row in rows)


_attention = tiles("BLOCK_T", "BLOCK_S")
_keys = tiles("BLOCK_T", "BLOCK_S", "WHOLE_UP_TO")
_linear = tiles("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "PARTS", "PER_SM")
# kernel: (width of its row, candidates)
CANDIDATES: dict[str, tuple[int, list[dict[str, int]]]] = {
    "attention_forward": (HEAD_DIM, [*_attention(
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 1), (128, 64, 8, 2),
        (128, 64, 8, 3), (128, 128, 8, 1), (128, 128, 8, 2), (64, 128, 4, 1), (64, 128, 4, 2), (64, 256, 4, 1),
        (128, 256, 8, 1), (128, 32, 8, 2), (64, 32, 4, 3),
    )]),
    "attention_backward_keys": (HEAD_DIM, [*_keys(
        (32, 64, 0, 4, 1), (32, 64, 0, 4, 2), (32, 64, 0, 4, 3), (64, 64, 0, 4, 1), (64, 64, 0, 4, 2),
        (64, 128, 0, 8, 1), (64, 128, 0, 8, 2), (32, 128, 0, 8, 1), (32, 128, 0, 8, 2), (32, 128, 0, 4, 2),
        (128, 64, 0, 4, 1), (128, 128, 0, 8, 1), (16, 64, 0, 4, 2),
        (16, 256, 256, 8, 1), (32, 256, 256, 8, 1), (16, 256, 256, 16, 1), (32, 256, 256, 16, 1),
    )]),
    "attention_backward_queries": (HEAD_DIM, [*_attention(
        (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 1), (128, 64, 8, 2), (64, 32, 4, 2),
        (64, 32, 4, 3), (64, 128, 4, 1), (128, 32, 8, 2), (128, 128, 8, 1), (128, 32, 4, 2),
    )]),
    "attention_delta": (HEAD_DIM, [*tiles("BLOCK")(
        (16, 4, 1), (32, 4, 1), (64, 4, 1), (128, 4, 1), (64, 8, 1), (32, 1, 1), (32, 2, 1)
    )]),
    "normalize": (WIDTH, [*tiles("BLOCK")(
        (1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1), (2, 8, 1), (4, 8, 1), (8, 8, 1)
    )]),
    "normalize_backward": (WIDTH, [*tiles("BLOCK")(
        (1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1), (2, 8, 1), (4, 8, 1), (8, 8, 1)
    )]),
    "activate": (0, [*tiles("BLOCK")(
        (512, 4, 1), (1024, 4, 1), (2048, 4, 1), (4096, 4, 1), (2048, 8, 1), (4096, 8, 1), (8192, 8, 1)
    )]),
    "linear": (0, [*_linear(
        (128, 128, 64, 8, 2, 2, 4, 2), (128, 128, 64, 8, 2, 2, 4, 3), (128, 128, 32, 8, 2, 2, 4, 4),
        (128, 128, 64, 8, 1, 1, 8, 3), (128, 128, 64, 8, 2, 1, 8, 4), (128, 256, 64, 8, 2, 1, 8, 3),
        (128, 256, 64, 16, 2, 1, 8, 3), (256, 128, 64, 8, 2, 1, 8, 3), (64, 256, 64, 8, 2, 2, 4, 2),
        (64, 128, 64, 8, 1, 3, 4, 3),
    )]),
}  # fmt: skip


def random(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def calls(images: int) -> dict[str, dict[str, Callable[[], object]]]:
    """{kernel: {what is timed: the call}}, on random numbers."""
    qkv = random(M, images, T, 3, HEADS, HEAD_DIM)
    first = random(images, IMAGE_TOKENS, 3, HEADS, HEAD_DIM).expand(M, images, IMAGE_TOKENS, 3, HEADS, HEAD_DIM)
    second = random(M, 1, TOKENS, 3, HEADS, HEAD_DIM).expand(M, images, TOKENS, 3, HEADS, HEAD_DIM)
    middle = attention._Problem(qkv.unbind(3), (None, None, None))
    two = attention._Problem(first.unbind(3), second.unbind(3))
    deep = attention._Problem(qkv[:, :, TOKENS:].contiguous().unbind(3), (None, *second.unbind(3)[1:]))
    problems = {"middle block": middle, "first block": two, "deep": deep}
    found: dict[str, dict[str, Callable[[], object]]] = {name: {} for name in CANDIDATES}
    for label, x in problems.items():
        out, lse = attention._launch_forward(x, SCALE)
        dout, nothing = torch.randn_like(out), (None, None)
        rows, keys = (
            [None if n == 0 or (label == "first block" and i == 0) else random(M, images, n, HEADS, HEAD_DIM)
             for i, n in enumerate(lengths)]
            for lengths in ((x.t1, x.t2), (x.s1, x.s2))
        )  # fmt: skip

        values = [None if y is None else torch.empty_like(y) for y in keys]

        def backward(dq, dk, dv, x=x, out=out, lse=lse, dout=dout):
            def call():
                attention._launch_backward(x, SCALE, out, lse, dout, dq, dk, dv)
                return [y for y in (*dq, *dk, *dv) if y is not None]

            return call

        found["attention_forward"][label] = lambda x=x: attention._launch_forward(x, SCALE)
        if label == "middle block":
            found["attention_delta"]["with no other kernel"] = backward(nothing, nothing, nothing)
        found["attention_backward_keys"][f"{label}, with delta"] = backward(nothing, keys, values)
        if label == "middle block":
            found["attention_backward_keys"]["all of it"] = backward(rows, keys, values)
        found["attention_backward_queries"][f"{label}, with delta"] = backward(rows, nothing, nothing)
    count = M * images * T
    x, low, y, z = (random(count, WIDTH) for _ in range(4))
    rstd = torch.rand(count, device=DEVICE) + 0.5
    found["normalize"]["forward"] = lambda: norm._launch(x, low, y, True, 1e-6, DTYPE)
    found["normalize_backward"]["backward"] = lambda: norm._launch_backward(x, y, z, rstd, True, DTYPE, DTYPE)
    wide, other = random(count, INNER), torch.empty(count, INNER, device=DEVICE, dtype=DTYPE)

    def activate(dout=None):
        activation.launch_activate(wide, other, "gelu", False, dout=dout)
        return [other]

    found["activate"]["forward"] = activate
    found["activate"]["backward"] = functools.partial(activate, wide)
    weight, transposed, bias = random(INNER, WIDTH), random(WIDTH, INNER), random(INNER)
    found["linear"]["fc1, kept"] = lambda: linear.linear_activate(y, weight, bias, "gelu", keep=True)
    found["linear"]["fc2, backward"] = lambda: [linear.linear_multiply(y, transposed, wide)]
    return found


def row_of(kernel: str) -> dict[str, int]:
    return row_in_use(kernel, 8 * DTYPE.itemsize, CANDIDATES[kernel][0])


def candidates(kernel: str) -> list[dict[str, int]]:
    shipped = {k: v for k, v in row_of(kernel).items() if k not in ("bits", "width")}
    return [shipped, *(c for c in CANDIDATES[kernel][1] if c != shipped)][: 2 if REHEARSE else None]


def build(kernel: str, options: dict[str, int]) -> None:
    """Run one candidate on a few rows: Triton compiles it and keeps the code on disk."""
    with instead(row_of(kernel), options):
        for call in calls(1)[kernel].values():
            with contextlib.suppress(Exception):  # the timing will say it
                call()


def compile_ahead(work: list[tuple[str, dict[str, int]]], seconds: float = 35) -> None:
    """The candidates side by side; those that time does not suffice for are compiled as they are timed."""
    workers = max(1, min(14, (os.cpu_count() or 1) - 1))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    # A candidate may take the compiler down, and the pool with it.
    with contextlib.suppress(BrokenProcessPool, TimeoutError):
        list(pool.map(build, *zip(*work, strict=True), timeout=seconds))
    pool.shutdown(wait=False, cancel_futures=True)


def results_of(call: Callable[[], object]) -> list[torch.Tensor]:
    return [y.clone() for y in call() if y.numel()]


def main() -> None:
    torch.manual_seed(0)
    record = provenance() | {"sequences": M * IMAGES, "kernels": {}}
    known = compiler.configurations()[compiler.architecture(torch.device(DEVICE))]
    work = [(name, options) for name in CANDIDATES if name in known for options in candidates(name)]
    of = calls(IMAGES)
    expected: dict[tuple[str, str], list[torch.Tensor]] = {}

    def measure(name: str, options: dict[str, int]) -> None:
        row: dict[str, object] = {"options": options}
        lost = None
        with instead(row_of(name), options):
            for label, call in of[name].items():
                try:
                    found = results_of(call)
                    right = expected.setdefault((name, label), found)  # the shipped row comes first
                    row[label] = median_ms(call, rounds=9, seconds=0.05)
                    row[f"{label}, difference"] = max(
                        (difference(*two) for two in zip(found, right, strict=True)), default=0.0
                    )
                except Exception as failure:  # too much shared memory, say
                    row[label] = f"failed: {failure!r:.120}"
                    lost = failure
        record["kernels"].setdefault(name, []).append(row)
        keep(record)
        times = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "options")
        print(name, *(f"{k}={v}" for k, v in options.items()), "|", " | ".join(times), flush=True)
        if lost is not None:
            end_if_lost(lost)

    shipped = [next(w for w in work if w[0] == name) for name in dict.fromkeys(name for name, _ in work)]
    for each in shipped:
        measure(*each)
    if not REHEARSE:
        compile_ahead(work)
    for each in work:
        if each not in shipped:
            measure(*each)


if __name__ == "__main__":
    main()
