"""What the kernels become on sm_80 and sm_90, without a GPU: python -m hgprompt.kernels.report [--json FILE]

Every kernel and configuration that ships is compiled ahead of time, and the machine code is read with the tools that
come with Triton: registers, spills, shared memory, and whether the products run on tensor cores. The exit status is 1
where a kernel spills, needs more shared memory than the architecture has, or has a product without tensor-core
instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgprompt.kernels import activation, attention, attention_kernels, compiler, gram, linear, mixture, moments, norm
from hgprompt.kernels.compiler import ARCHITECTURES, SHARED_MEMORY, configurations, triton

_TYPES = {16: ("bf16", "fp16"), 32: ("fp32",), 64: ("fp64",)}


@dataclass(frozen=True)
class Case:
    """One kernel to compile: its pointers' types by name, descriptors' tiles, constants, and Triton's options."""

    kernel: Any
    name: str
    dtype: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    float32: tuple[str, ...] = ()
    float64: tuple[str, ...] = ()
    int64: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    tiles: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def uses_tensor_cores(self) -> bool:
        return "PRECISION" in self.constants

    @property
    def fills_warpgroups(self) -> bool:
        """Whether sm_90 can take its products four warps at a time, by wgmma: 16 bits, and tiles of 64 rows."""
        rows = [self.constants[name] for name in ("BLOCK_M", "BLOCK_T") if name in self.constants]
        return self.uses_tensor_cores and self.dtype in ("bf16", "fp16") and all(n >= 64 for n in rows)


@dataclass(frozen=True)
class Compiled:
    """What came out of one case on one architecture."""

    kernel: str
    architecture: str
    dtype: str
    constants: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    warpgroup_instructions: int
    wide_loads: int
    faults: tuple[str, ...]


def cases(architecture: str) -> Iterator[Case]:
    """Everything that ships: every row of the configurations, in both kinds of every compile-time switch; and the other
    form of attention's backward pass, which is to be measured against it (benchmarks/gpu_kernels.py)."""
    table = configurations()[architecture]
    for kernel, rows in table.items():
        for row in rows:
            for dtype in _TYPES[row["bits"]]:
                yield from _cases(kernel, row, dtype)
            if (
                architecture == "sm_90"
                and kernel == "attention_backward_keys"
                and (row["bits"], row["width"]) == (16, 64)
            ):
                other = _cases(kernel, row | attention.ONE_PROGRAM, "bf16")
                yield from (case for case in other if case.constants["WHOLE"])


def _cases(kernel: str, row: dict[str, int], dtype: str) -> Iterator[Case]:
    options = {k: v for k, v in row.items() if k not in ("bits", "width", "num_warps", "num_stages", "WHOLE_UP_TO")}
    launch: dict[str, Any] = {"num_warps": row["num_warps"], "num_stages": row["num_stages"]}
    precision = {"PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}
    if kernel.startswith("attention"):
        width = row["width"]
        head = {"H": 12, "D": width, "BLOCK_D": compiler.next_power_of_2(width)}
        function = getattr(attention_kernels, kernel.removeprefix("attention_"))
        if kernel == "attention_delta":
            yield Case(function, kernel, dtype, head | options, **launch, float32=("delta",))
            return
        # One segment, deep prompts (which are keys alone), both. Where heads are padded the masks take registers too.
        for two_q, two_k in ((False, False), (False, True), (True, True)):
            padded = {"D": 80} if width == 128 and two_k and not two_q else {}
            both = head | padded | precision | options | {"TWO_Q": two_q, "TWO_K": two_k}
            if kernel == "attention_backward_keys":
                both |= {"WHOLE": False}
            yield Case(function, kernel, dtype, both, **launch, float32=("lse", "delta"), scalars=("scale",))
            if not two_q:  # as few queries as the last block has
                yield Case(
                    function, kernel, dtype, both | {"BLOCK_T": 16}, **launch, float32=("lse", "delta"),
                    scalars=("scale",),
                )  # fmt: skip
        if row.get("WHOLE_UP_TO"):
            whole = both | {"WHOLE": True, "BLOCK_S": compiler.next_power_of_2(row["WHOLE_UP_TO"])}
            yield Case(function, kernel, dtype, whole, **launch, float32=("lse", "delta"), scalars=("scale",))
    elif kernel.startswith("normalize"):
        if dtype == "fp16":  # as bfloat16, but for one conversion
            return
        shape = {"D": row["width"] * 3 // 4, "BLOCK_D": row["width"], "CENTRE": True} | options
        # The row is chosen by the stream; what is added to it and its normalised rows have 16 bits.
        wide = dtype == "fp32"
        if kernel == "normalize":
            stream = ("x", "total") if wide else ()
            for low, add in ((False, False), (False, True), *(() if wide else ((True, True),))):
                yield Case(norm._forward, kernel, "bf16", shape | {"LOW": low, "ADD": add}, **launch,
                           float32=(*stream, "rstd"), scalars=("eps",))  # fmt: skip
        else:
            stream = ("dtotal", "dx") if wide else ()
            yield Case(norm._backward, kernel, "bf16", shape | {"ADDED": True, "TWO": wide}, **launch,
                       float32=(*stream, "rstd"))  # fmt: skip
    elif kernel == "activate":
        for gated in (False, True):
            for function in (activation._activate, activation._activate_backward):
                for name in _activations(dtype):
                    fixed = {"F": 3072, "GATED": gated, "ACTIVATION": name} | options
                    yield Case(function, kernel, dtype, fixed, **launch)
    elif kernel == "linear":
        m, n, k = (options[f"BLOCK_{letter}"] for letter in "MNK")
        options.pop("PER_SM")
        tiles = {"a": (m, k), "b": (n, k)} | dict.fromkeys(("out", "slope"), (m, n // options["PARTS"]))
        for name in _activations(dtype):
            for keep in (False, True):
                ahead = {"BIAS": True, "ACTIVATION": name, "KEEP": keep, "MULTIPLY": False}
                yield Case(linear._linear, kernel, dtype, ahead | precision | options, **launch, tiles=tiles)
        back = {"BIAS": False, "ACTIVATION": "relu", "KEEP": False, "MULTIPLY": True}
        tiles = tiles | {"b": (k, n)}
        yield Case(linear._linear, kernel, dtype, back | precision | options, **launch, tiles=tiles)
    elif kernel == "add_moments":
        block = {"H": 768, "PRECISION": "tf32x3"} | options
        yield Case(moments._add_block_row, kernel, dtype, block, **launch, float32=("high", "low"), float64=("row",))
    elif kernel in _SUMS:
        if dtype == "fp16":  # as bfloat16, but for one conversion
            return
        function, float64, shape = _SUMS[kernel]
        yield Case(
            function, kernel, dtype, shape | options, **launch, float64=float64, int64=("order", "starts", "offsets")
        )
    elif kernel == "gram":
        for parts in (False, True):
            columns = {"PARTS": parts, "PRECISION": "tf32x3"} | options
            yield Case(gram._products, kernel, dtype, columns, **launch, float64=("out",))
    else:
        raise LookupError(f"the report does not know the kernel {kernel}")


# Reductions in float64, bound by memory: they have no products for tensor cores.
_SUMS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "class_sums": (moments._class_sums, ("centre", "out"), {"H": 768}),
    "mix": (mixture._mix, ("means", "weights", "out"), {"H": 768}),
    "pull_back_mixture": (mixture._pull_back, ("slope", "means", "out"), {"H": 768}),
    "assemble": (mixture._assemble, ("factors", "out"), {"H": 768, "UNIT": 2}),
    "block_products": (mixture._block_products, ("matrix", "out"), {"H": 768, "UNIT": 2}),
}


def _activations(dtype: str) -> tuple[str, ...]:
    """All in bfloat16, the one with the longest code in the other dtypes."""
    return ("gelu", "gelu_tanh", "silu", "relu") if dtype == "bf16" else ("gelu",)


def compile_case(case: Case, architecture: str) -> Compiled:
    """Compile one case and read its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {}
    for name in names:
        if name in case.constants:
            signature[name] = "constexpr"
        elif name in case.float32:
            signature[name] = "*fp32"
        elif name in case.float64:
            signature[name] = "*fp64"
        elif name in case.int64:
            signature[name] = "*i64"
        elif name in case.scalars:
            signature[name] = "fp32"
        elif name in case.tiles:
            rows, columns = case.tiles[name]
            signature[name] = f"tensordesc<{case.dtype}[{rows}, {columns}]>"
        elif _is_pointer(case.kernel, name):
            signature[name] = f"*{case.dtype}"
        else:
            signature[name] = "i32"
    # As at run time: pointers and strides of rows are multiples of 16.
    aligned = [
        i for i, n in enumerate(names) if signature[n].startswith("*") or (signature[n] == "i32" and _is_stride(n))
    ]
    source = ASTSource(case.kernel, signature, case.constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages} | compiler.FUSION
    built = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[architecture], 32), options=options)
    usage, code = _read(built.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of {case.name}: {usage[:500]}")
    products = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "HMMA")}
    result = Compiled(
        kernel=case.kernel.__name__.strip("_") if case.name == "activate" else case.name,
        architecture=architecture,
        dtype=case.dtype,
        constants=_describe(case),
        registers=int(found[1]),
        spilled_bytes=int(found[2]),
        shared_bytes=int(built.metadata.shared),
        tensor_core_instructions=sum(products.values()),
        warpgroup_instructions=products["HGMMA"],
        wide_loads=len(re.findall(r"\b(?:LDG\.E\.128|LDGSTS\.E\.(?:BYPASS\.)?(?:LTC128B\.)?128)", code)),
        faults=(),
    )
    return dataclasses.replace(result, faults=faults(result, case))


def faults(result: Compiled, case: Case) -> tuple[str, ...]:
    """What must not ship."""
    found = []
    if result.spilled_bytes:
        found.append(f"spills {result.spilled_bytes} bytes")
    if result.shared_bytes > SHARED_MEMORY[result.architecture]:
        found.append(f"needs {result.shared_bytes} bytes of shared memory")
    if case.uses_tensor_cores and not result.tensor_core_instructions:
        found.append("has products without tensor-core instructions")
    elif result.architecture == "sm_90" and case.fills_warpgroups and not result.warpgroup_instructions:
        found.append("has products of whole tiles without warpgroup instructions")
    return tuple(found)


def _is_pointer(kernel: Any, name: str) -> bool:
    return name in _POINTERS[kernel.__module__.rsplit(".", 1)[-1]]


_POINTERS = {
    "attention_kernels": {"q1", "q2", "k1", "k2", "v1", "v2", "out", "dout", "lse", "delta",
                          "dq1", "dq2", "dk1", "dk2", "dv1", "dv2"},
    "norm": {"x", "low", "y", "total", "total_low", "z", "rstd", "dtotal", "dz", "dx", "dy"},
    "activation": {"pre", "out", "dout", "dpre"},
    "linear": {"bias"},
    "moments": {"features", "centre", "order", "starts", "out", "row", "high", "low"},
    "mixture": {"features", "means", "weights", "out", "slope", "rows", "offsets", "factors", "matrix"},
    "gram": {"whole", "parts", "out"},
}  # fmt: skip


def _is_stride(name: str) -> bool:
    return bool(re.fullmatch(r"(d?[qkv][12]_[mbnt])|N|K|count|f_[mb]|D|columns|p_k", name))


def _describe(case: Case) -> str:
    hidden = ("H", "PRECISION", "GROUP", "BLOCK_D")
    shown = {k: v for k, v in case.constants.items() if k not in hidden and v is not False}
    shown |= {"warps": case.num_warps, "stages": case.num_stages}
    return " ".join(k if v is True else f"{k}={v}" for k, v in shown.items())


def _read(cubin: bytes) -> tuple[str, str]:
    """Resource usage and disassembly, by the tools in Triton's own folder."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [str(tools / "cuobjdump"), "--dump-resource-usage", file.name],
            [str(tools / "nvdisasm"), "-c", file.name],
        )
        usage, code = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), action="append", help="default: all")
    arguments = parser.parse_args(argv)
    if triton is None:
        print("there is no Triton on this machine: nothing to compile")
        return 1
    if compiler.interpreted():
        print("TRITON_INTERPRET=1 is set: nothing would be compiled")
        return 1
    began = time.perf_counter()
    places = [(a, i) for a in arguments.architecture or ARCHITECTURES for i, _ in enumerate(cases(a))]
    with ProcessPoolExecutor(min(8, len(os.sched_getaffinity(0))), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(_compile_one, places, chunksize=4))
    print(table(results))
    if arguments.json is not None:
        record = {"triton": triton.__version__, "kernels": [dataclasses.asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    bad = [r for r in results if r.faults]
    for result in bad:
        what = f"{result.kernel} {result.architecture} {result.dtype} {result.constants}"
        print(f"FAULT {what}: {', '.join(result.faults)}")
    seconds = time.perf_counter() - began
    print(f"{len(results)} kernels compiled with Triton {triton.__version__} in {seconds:.0f} s, {len(bad)} at fault")
    return 1 if bad else 0


def _compile_one(place: tuple[str, int]) -> Compiled:
    """One case by its place, in a process of its own: kernels cannot be sent there."""
    architecture, number = place
    return compile_case(next(itertools.islice(cases(architecture), number, None)), architecture)


def table(results: list[Compiled]) -> str:
    """One line a kernel."""
    heads = f"{'kernel':26} {'arch':6} {'type':5} {'regs':>4} {'spill':>5} {'shared':>7} {'tensor':>6} {'wide':>4}"
    return "\n".join([heads + "  configuration", *(_line(r) for r in results)])


def _line(r: Compiled) -> str:
    return (
        f"{r.kernel:26} {r.architecture:6} {r.dtype:5} {r.registers:4} {r.spilled_bytes:5} {r.shared_bytes:7} "
        f"{r.tensor_core_instructions:6} {r.wide_loads:4}  {r.constants}"
    )


if __name__ == "__main__":
    sys.exit(main())
