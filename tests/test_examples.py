"""The examples run as their first lines say, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hgprompt
from hgprompt.data import render_task
from hgprompt.tuning import random_prompt

ROOT = Path(__file__).parents[1]
IMAGES = 48
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A pool of prompts about one start, as tuned ones are."""
    vit = hgprompt.load_backbone("mini")
    start, g = random_prompt(vit, 4), torch.Generator().manual_seed(0)
    prompts = {name: start + 0.3 * torch.randn(start.shape, generator=g) for name in ("cats", "dogs")}
    path = tmp_path_factory.mktemp("pool") / "pool.safetensors"
    hgprompt.PromptPool(prompts, backbone=vit.info).save(path)
    return path


@pytest.fixture(scope="module")
def alone(pool):
    """What one process makes of the examples' task."""
    images = render_task("nearest-distance", IMAGES, image_size=64)
    return hgprompt.fast_ensemble(hgprompt.PromptPool.load(pool), images.batches(32), backbone="mini")


def _run(folder, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def _printed_weights(output):
    """{name: α} of a printed result; once, by the first process."""
    assert output.count("H alone") == 1
    assert f"{IMAGES} images" in output
    return {name: float(re.search(rf"^{name} +(\d\.\d+)", output, re.M)[1]) for name in ("cats", "dogs")}


def test_torchrun(tmp_path, pool, alone):
    """With shares of the prompts; tests/cli/test_ensemble.py has torchrun share the images."""
    example = ROOT / "examples" / "torchrun_ensemble.py"
    output = _run(tmp_path, *TORCHRUN, example, pool, "--images", IMAGES, "--out", "mix", "--shard", "prompts")
    result = hgprompt.EnsembleResult.load(tmp_path / "mix")
    torch.testing.assert_close(result.weights, alone.weights, rtol=0, atol=1e-6)  # features are float32
    assert _printed_weights(output) == pytest.approx(
        dict(zip(alone.names, alone.weights.tolist(), strict=True)), abs=6e-4
    )


def test_torchrun_starts_a_job_again_where_it_was(tmp_path, pool):
    program = Path(__file__).parent / "programs" / "restarted_pass.py"
    _run(tmp_path, *TORCHRUN, "--max-restarts", "1", program, pool, tmp_path)
    images = render_task("nearest-distance", 80, image_size=64)
    undisturbed = hgprompt.fast_ensemble(hgprompt.PromptPool.load(pool), images.batches(32), backbone="mini")
    found = hgprompt.EnsembleResult.load(tmp_path / "mix")
    torch.testing.assert_close(found.weights, undisturbed.weights, rtol=0, atol=1e-6)  # features are float32
    # Rank 1 was killed with three of its five batches done, the last of which no checkpoint may have been paid for.
    encoded, batches = map(int, (tmp_path / "encoded-1").read_text().split())
    assert batches == 5
    assert 2 <= encoded < 5
    assert not list((tmp_path / "pass").iterdir())


def test_accelerate(tmp_path, pool, alone):
    pytest.importorskip("accelerate", reason="pip install 'hgprompt[examples]'")
    example = ROOT / "examples" / "accelerate_ensemble.py"
    output = _run(tmp_path, *TORCHRUN, example, pool, "--images", IMAGES, "--epochs", 1)
    # Accelerate deals whole batches: other folds, so that the heads of the gradients differ a little.
    assert _printed_weights(output) == pytest.approx(
        dict(zip(alone.names, alone.weights.tolist(), strict=True)), abs=0.05
    )
    assert output.count("epoch 0: loss") == 1


def test_lightning(tmp_path, pool, alone):
    pytest.importorskip("lightning", reason="pip install 'hgprompt[examples]'")
    example = ROOT / "examples" / "lightning_callback.py"
    output = _run(tmp_path, example, pool, "--images", IMAGES, "--epochs", 1, "--devices", 2)
    assert _printed_weights(output) == pytest.approx(
        dict(zip(alone.names, alone.weights.tolist(), strict=True)), abs=6e-4
    )
    assert 0 <= float(re.search(r"would take (\d\.\d+) of the tuned prompt", output)[1]) <= 1
