"""What the kernels need of Triton, importable where there is none: the decorator, launch options, precision."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is on the machines that have a GPU; elsewhere the plain functions stand alone
    triton = tl = None

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
"""Bytes that one program can have (A100, A800; H100, H200)."""


# Numbers that change from batch to batch. Triton would compile a kernel anew for one that is 1, or a multiple of 16;
# none of them says anything of the contiguous axis, whose alignment it needs to know.
_VARYING = ("B", "T1", "T2", "S1", "S2", "first_key", "first_query", "rows", "M")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, compiled once whatever the batch; or the bare function where there is no Triton (which nothing then
    launches)."""
    if triton is None:
        return function
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in _VARYING if name in arguments])


def interpreted() -> bool:
    """Whether kernels run on the CPU, for tests: TRITON_INTERPRET=1 when Triton was imported."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def available(device: torch.device) -> bool:
    """Whether the kernels run on this device: a GPU from sm_80 on, or a CPU under Triton's interpreter."""
    if triton is None or interpreted():
        return triton is not None and device.type == "cpu"
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(x: Tensor, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32)) -> bool:
    """Whether kernels that read these dtypes run on x."""
    return x.dtype in dtypes and available(x.device)


def with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it where its last dimension does not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def configurations() -> dict[str, dict[str, list[dict[str, int]]]]:
    """The checked-in launch options: {architecture: {kernel: rows}}, see `launch_options`."""
    text = (resources.files("hgprompt.kernels") / "configurations.json").read_text()
    found: dict[str, dict[str, list[dict[str, int]]]] = json.loads(text)
    return found


FUSION = {"enable_fp_fusion": True}
"""Products and sums as one rounding: said, so that another default of Triton's does not change the numbers."""


def launch_options(kernel: str, x: Tensor, width: int) -> dict[str, int]:
    """Tile sizes and Triton's options for a kernel on x's device and dtype.

    The first row of the kernel's table with x's bits and a `width` of at least the one asked for; what `width` means is
    the kernel's. One good row per case, no tuning at run time: a first call compiles once per case.
    """
    return _row(kernel, architecture(x.device), 8 * x.element_size(), width) | FUSION


@functools.cache
def _row(kernel: str, architecture: str, bits: int, width: int) -> dict[str, int]:
    for row in configurations()[architecture][kernel]:
        if row["bits"] == bits and row["width"] >= width:
            return {name: value for name, value in row.items() if name not in ("bits", "width")}
    raise LookupError(f"{kernel} has no configuration for {bits} bits and width {width} on {architecture}")


@functools.cache
def architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "sm_90"  # the interpreter runs what either has
    return "sm_90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm_80"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the tensor's own device, whatever the current one is."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def copied(x: Tensor, device: torch.device) -> Tensor:
    """x on a device. The host does not wait for the copy from its own memory to a GPU's."""
    if device.type != "cuda" or x.is_cuda or torch.compiler.is_compiling():
        return x.to(device)
    # Also of memory that is pinned already: its owner could fill it again before the GPU has read it.
    return torch.empty_like(x, pin_memory=True).copy_(x).to(device, non_blocking=True)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and at least 16: the least extent of a `tl.dot`."""
    return max(16, 1 << (n - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: three TF32 products give what float32 promises; below float32 it means nothing."""
    return "tf32x3" if dtype == torch.float32 else "ieee"
