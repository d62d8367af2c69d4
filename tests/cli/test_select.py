"""hgprompt select: the pool it writes is what select_prompts finds."""

from __future__ import annotations

import json

import pytest
import torch

from hgprompt import PromptPool, load_backbone, select_prompts
from hgprompt.data import render_task

COMMAND = ("select", "pool.safetensors", "procedural:sprite-x-location", "--device", "cpu", "--image-size", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("select")
    g = torch.Generator().manual_seed(0)
    prompts = {f"p{i}": 0.1 * torch.randn(2, 192, generator=g) for i in range(8)}
    PromptPool(prompts, backbone=load_backbone("mini", device="cpu").info).save(root / "pool.safetensors")
    return root


def test_writes_the_pool_of_the_prompts_selected(place, here):
    done = here(place, *COMMAND, "--size", "2", "--limit", "64", "--json", "--full-evaluation")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    pool = PromptPool.load(place / "selected.safetensors")
    assert list(record["weights"]) == list(pool)
    assert record["share"] < 1
    assert record["rounds"][0] == [0, 8]
    # The same as from Python: one order of the images, drawn with the seed.
    vit = load_backbone("mini", device="cpu", img_size=32)
    images = render_task("sprite-x-location", 64, image_size=32)
    images = images.subset(torch.randperm(64, generator=torch.Generator().manual_seed(0)))
    expected = select_prompts(PromptPool.load(place / "pool.safetensors"), images.batches(16), size=2, backbone=vit)
    assert tuple(pool) == expected.names
    assert torch.equal(pool.stack(), expected.pool.stack())


def test_errors_are_one_line(place, here):
    for arguments, code, message in (
        (("--size", "9"), 1, "size must be"),
        (("--size", "2", "--out", "."), 1, "--out . is a folder"),
        (("--size", "2", "--out", "pool.safetensors"), 1, "is the pool itself"),
        (("--size", "2", "--method", "x"), 2, "'halving', 'greedy', 'ranking'"),
    ):
        done = here(place, *COMMAND, "--limit", "40", "--out", "none.safetensors", *arguments)
        assert done.code == code
        assert message in " ".join(done.err.split())
        assert "Traceback" not in done.err
        assert not (place / "none.safetensors").exists()
