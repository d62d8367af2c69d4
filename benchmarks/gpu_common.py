"""What the GPU benchmarks share: the setting, timing, ceilings, and records that say where they come from."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch

from hgprompt.kernels import compiler

REHEARSE = "--rehearse" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter's bfloat16 products are wrong
# The paper's setting: ViT-B/16, 224 pixels, 50 prompt tokens, 13 prompts.
SIZE, TOKENS, M, B, DEPTH, WIDTH, HEADS = (32, 5, 2, 2, 2, 96, 3) if REHEARSE else (224, 50, 13, 64, 12, 768, 12)
INNER, HEAD_DIM, IMAGE_TOKENS = 4 * WIDTH, WIDTH // HEADS, (SIZE // 16) ** 2 + 1


def network():
    """timm's ViT-B/16 at the setting's size, random weights from seed 0, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", pretrained=False, num_classes=0, img_size=SIZE, depth=DEPTH, embed_dim=WIDTH,
        num_heads=HEADS,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def instead(row: dict[str, int], options: dict[str, int]) -> Iterator[None]:
    """A row of the kernels' launch options with others in it while the block runs."""
    kept = dict(row)
    row.update(options)
    compiler._row.cache_clear()
    try:
        yield
    finally:
        row.clear()
        row.update(kept)
        compiler._row.cache_clear()


def row_in_use(kernel: str, bits: int, width: int) -> dict[str, int]:
    """The row of the launch options that a kernel takes on this device."""
    rows = compiler.configurations()[compiler.architecture(torch.device(DEVICE))][kernel]
    return next(r for r in rows if r["bits"] == bits and r["width"] >= width)


def median_ms(function, rounds=3 if REHEARSE else 20, seconds=0.5) -> float:
    """Median milliseconds of a call, on the device's own clock where it has one; fewer rounds, but three, where they
    would take longer than `seconds`.

    On a GPU the caches are flushed before each call, and the device sleeps for a moment, so that the host is ahead and
    its own work is not measured, as far as that moment suffices: it does for a kernel, and not for a whole network
    (`host_ms`).
    """
    function()
    took = once_ms(function)
    rounds = max(3, min(rounds, int(1e3 * seconds / took)))
    if DEVICE != "cuda":
        return host_ms(function, rounds)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    events = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(4_000_000)  # about 2 ms
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def end_if_lost(failure: Exception) -> None:
    """Leave where the device takes no more work of this process: what follows would only fail too."""
    words = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure")
    if isinstance(failure, torch.AcceleratorError) or any(word in str(failure) for word in words):
        raise SystemExit(f"the device is lost: {failure!r:.300}") from failure


def difference(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def once_ms(function: Callable[[], object]) -> float:
    """Milliseconds of one call until the device has done it, by the host's clock."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def host_ms(function: Callable[[], object], rounds: int = 5) -> float:
    """Median milliseconds until a call returns, whatever the device still has to do: where they are more than the
    device's own, the device waits for the host."""
    times = []
    for _ in range(rounds):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def ceilings(rows: int) -> dict[str, float]:
    """Measured in this run: TFLOP/s of the library's product at the network's four shapes, with as many rows as what
    stands beside them has, and GB/s of a large copy."""
    rows = 64 if REHEARSE else rows
    found = {}
    for name, (k, n) in {
        "qkv": (WIDTH, 3 * WIDTH), "proj": (WIDTH, WIDTH), "fc1": (WIDTH, INNER), "fc2": (INNER, WIDTH)
    }.items():  # fmt: skip
        a, w = (torch.randn(s, device=DEVICE, dtype=DTYPE) for s in ((rows, k), (n, k)))
        ms = median_ms(lambda a=a, w=w: torch.nn.functional.linear(a, w))
        found[f"{name} TFLOP/s"] = 2 * rows * k * n / ms / 1e9
    x = torch.randn(1 << (16 if REHEARSE else 28), device=DEVICE)
    y = torch.empty_like(x)
    found["copy GB/s"] = 2 * 4 * x.numel() / median_ms(lambda: y.copy_(x)) / 1e6
    return found


def peak_gigabytes(function: Callable[[], object]) -> float:
    """Memory that a call takes at its peak beside what was there before; NaN without a GPU."""
    if DEVICE != "cuda":
        function()
        return float("nan")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def provenance() -> dict[str, object]:
    """Device, driver, versions, commit."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return ""

    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu (rehearsal)",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {p: of(p) for p in ("torch", "triton", "timm")} | {"cuda": torch.version.cuda},
        "commit": output("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", ""),
        "dirty": bool(output("git", "status", "--porcelain", "--untracked-files=no")),
        "dtype": str(DTYPE),
        "shapes": {"M": M, "B": B, "p": TOKENS, "pixels": SIZE, "depth": DEPTH, "width": WIDTH},
    }


def keep(record: dict) -> None:
    """Write what there is so far, whole: a part that runs out of time leaves its first figures."""
    path = Path(sys.argv[1])
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)
