"""The compile report: what it finds, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# Compiled code and the interpreter exclude each other in one process.
_PROGRAM = """
import dataclasses, json, sys
from hgprompt.kernels import report

chosen = [c for c in report.cases("sm_80") if c.name == {name!r} and c.dtype == {dtype!r}][:1]
changed = [dataclasses.replace(c, constants=c.constants | {changes!r}, **{options!r}) for c in chosen]
print(json.dumps([dataclasses.asdict(report.compile_case(c, {architecture!r})) for c in changed]))
"""


def _compile(name, dtype="bf16", architecture="sm_80", changes=None, **options):
    program = _PROGRAM.format(name=name, dtype=dtype, architecture=architecture, changes=changes or {}, options=options)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_shipped_kernel_is_without_fault(architecture):
    found = _compile("attention_forward", architecture=architecture)
    assert found["faults"] == []
    assert found["registers"] > 16
    assert found["tensor_core_instructions"] > 0
    assert found["wide_loads"] > 0  # 16 bytes at once, although rows come from two segments


def test_a_sum_in_float64_reads_16_bytes_at_once():
    """Although the rows of blocks are found by addresses that the compiler does not know."""
    found = _compile("assemble", dtype="fp64")
    assert found["faults"] == []
    assert found["wide_loads"] > 0


def test_spills_are_a_fault():
    found = _compile("attention_forward", changes={"BLOCK_T": 128, "BLOCK_S": 128})  # 128 × 128 scores in 4 warps
    assert found["spilled_bytes"] > 0
    assert any("spills" in fault for fault in found["faults"])


def test_too_much_shared_memory_is_a_fault():
    found = _compile("linear", changes={"BLOCK_K": 128, "KEEP": False}, num_stages=4)
    assert found["shared_bytes"] > 163 * 1024
    assert any("shared memory" in fault for fault in found["faults"])


def test_products_without_tensor_cores_are_a_fault():
    found = _compile("attention_forward", dtype="fp32", changes={"PRECISION": "ieee"})
    assert found["tensor_core_instructions"] == 0
    assert any("tensor-core" in fault for fault in found["faults"])


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
        named = [c.name for c in report.cases(architecture)]
        assert set(named) == set(table), architecture


def test_every_launch_on_this_machine_has_a_row():
    from hgprompt.kernels.compiler import launch_options

    for dtype in (torch.float16, torch.float32):
        x = torch.empty(1, dtype=dtype)
        for width in (16, 32, 64, 128):
            assert launch_options("attention_forward", x, width)["num_warps"] >= 1
    with pytest.raises(LookupError, match="no configuration"):
        launch_options("attention_forward", torch.empty(1, dtype=torch.float64), 64)
