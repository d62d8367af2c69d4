"""hgprompt select in a process of its own: the pool it writes is what select_prompts finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hgprompt import PromptPool, load_backbone, select_prompts
from hgprompt.data import render_task

COMMAND = ("select", "pool.safetensors", "procedural:sprite-x-location", "--device", "cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("select")
    g = torch.Generator().manual_seed(0)
    prompts = {f"p{i}": 0.1 * torch.randn(2, 192, generator=g) for i in range(8)}
    PromptPool(prompts, backbone=load_backbone("mini", device="cpu").info).save(root / "pool.safetensors")
    return root


def _run(place, *arguments):
    environment = os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "hgprompt.cli", *COMMAND, *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


def test_writes_the_pool_of_the_prompts_selected(place):
    done = _run(place, "--size", "2", "--limit", "128", "--json", "--full-evaluation")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    pool = PromptPool.load(place / "selected.safetensors")
    assert list(record["weights"]) == list(pool)
    assert record["share"] < 1
    assert record["rounds"][0] == [0, 8]
    # The same as from Python: one order of the images, drawn with the seed.
    vit = load_backbone("mini", device="cpu")
    images = render_task("sprite-x-location", 128, image_size=64)
    images = images.subset(torch.randperm(128, generator=torch.Generator().manual_seed(0)))
    expected = select_prompts(PromptPool.load(place / "pool.safetensors"), images.batches(16), size=2, backbone=vit)
    assert tuple(pool) == expected.names
    assert torch.equal(pool.stack(), expected.pool.stack())


def test_errors_are_one_line(place, here):
    for arguments, code, message in (
        (("--size", "9"), 1, "size must be"),
        (("--size", "2", "--out", "."), 1, "--out . is a folder"),
        (("--size", "2", "--method", "x"), 2, "'halving', 'greedy', 'ranking'"),
    ):
        done = here(place, *COMMAND, "--limit", "40", "--out", "none.safetensors", *arguments)
        assert done.code == code
        assert message in " ".join(done.err.split())
        assert "Traceback" not in done.err
        assert not (place / "none.safetensors").exists()
