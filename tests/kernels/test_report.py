"""The compile report: what it finds, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# What is compiled: the first case of a kernel and dtype, on an architecture, with something changed.
CASES = {
    "shipped, sm_80": ("attention_forward", "bf16", "sm_80", {}, {}),
    "shipped, sm_90": ("attention_forward", "bf16", "sm_90", {}, {}),
    "sum": ("assemble", "fp64", "sm_80", {}, {}),
    "128 × 128 scores in 4 warps": ("attention_forward", "bf16", "sm_80", {"BLOCK_T": 128, "BLOCK_S": 128}, {}),
    "eight stages": ("linear", "bf16", "sm_90", {}, {"num_stages": 8}),
    "two warps": ("attention_forward", "bf16", "sm_90", {}, {"num_warps": 2}),
    "ieee": ("attention_forward", "fp32", "sm_80", {"PRECISION": "ieee"}, {}),
}
_PROGRAM = """
import dataclasses, json, sys
from hgprompt.kernels import report

found = {}
for key, (name, dtype, architecture, constants, options) in json.load(sys.stdin).items():
    case = next(c for c in report.cases(architecture) if c.name == name and c.dtype == dtype)
    case = dataclasses.replace(case, constants=case.constants | constants, **options)
    found[key] = dataclasses.asdict(report.compile_case(case, architecture))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled():
    """In a process of their own: compiled code and the interpreter exclude each other in one."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(CASES), capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_shipped_kernel_is_without_fault(compiled, architecture):
    found = compiled[f"shipped, {architecture}"]
    assert found["faults"] == []
    assert found["registers"] > 16
    assert found["tensor_core_instructions"] > 0
    assert found["wide_loads"] > 0  # 16 bytes at once, although rows come from two segments


def test_a_sum_in_float64_reads_16_bytes_at_once(compiled):
    """Although the rows of blocks are found by addresses that the compiler does not know."""
    assert compiled["sum"]["faults"] == []
    assert compiled["sum"]["wide_loads"] > 0


def test_spills_are_a_fault(compiled):
    found = compiled["128 × 128 scores in 4 warps"]
    assert found["spilled_bytes"] > 0
    assert any("spills" in fault for fault in found["faults"])


def test_too_much_shared_memory_is_a_fault(compiled):
    assert compiled["eight stages"]["shared_bytes"] > 227 * 1024
    assert any("shared memory" in fault for fault in compiled["eight stages"]["faults"])


def test_products_without_tensor_cores_are_a_fault(compiled):
    assert compiled["ieee"]["tensor_core_instructions"] == 0
    assert any("tensor-core" in fault for fault in compiled["ieee"]["faults"])


def test_warps_by_themselves_are_a_fault_on_hopper(compiled):
    """wgmma takes four warps: with two there are tensor cores, at a part of their rate."""
    assert compiled["two warps"]["tensor_core_instructions"] > 0
    assert compiled["two warps"]["warpgroup_instructions"] == 0
    assert any("warpgroup" in fault for fault in compiled["two warps"]["faults"])


def test_the_command_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "hgprompt.kernels.report"], capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "TRITON_INTERPRET" in done.stdout


def test_every_configuration_is_compiled():
    """No row of the table is left out, in either dtype of its width: a new kernel must be made known to the report."""
    from hgprompt.kernels import report

    for architecture, table in report.configurations().items():
        compiled = [(c.name, c.num_warps, c.num_stages, c.constants) for c in report.cases(architecture)]
        for kernel, rows in table.items():
            for row in rows:
                tiles = {k: v for k, v in row.items() if k.startswith("BLOCK")}
                assert any(
                    (name, warps, stages) == (kernel, row["num_warps"], row["num_stages"])
                    and tiles.items() <= constants.items()
                    for name, warps, stages, constants in compiled
                ), (architecture, kernel, row)  # fmt: skip


def test_every_launch_on_this_machine_has_a_row():
    from hgprompt.kernels.compiler import launch_options

    for dtype in (torch.float16, torch.float32):
        x = torch.empty(1, dtype=dtype)
        for width in (16, 32, 64, 128):
            assert launch_options("attention_forward", x, width)["num_warps"] >= 1
    with pytest.raises(LookupError, match="no configuration"):
        launch_options("attention_forward", torch.empty(1, dtype=torch.float64), 64)
