"""The demo, small: what it writes is what it measured."""

from __future__ import annotations

import dataclasses
import json

import literal
import pytest
import torch

from hgprompt import EnsembleResult, FrozenViT, OptionError, OutputError, PromptPool
from hgprompt.data import PROCEDURAL_TASKS
from hgprompt.demo import PLANS, DemoPlan, run_demo

SMALL = DemoPlan(
    target="sprite-x-location", source_images=18, source_epochs=1, images=32, test_images=16, epochs=2, seeds=(1, 2),
    num_tokens=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def vit():
    return FrozenViT.from_timm(literal.tiny_vit(img_size=32))


@pytest.fixture(scope="module")
def whole(vit, tmp_path_factory):
    """Its folder, and what it returned: pool and comparison."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, *run_demo(vit, SMALL, folder)


def test_runs_whole(vit, whole):
    tmp_path, pool, comparison = whole
    assert set(pool) == set(PROCEDURAL_TASKS) - {"sprite-x-location"}
    assert PromptPool.load(tmp_path / "pool.safetensors").names == pool.names
    assert comparison.starts == ("random", "best single by H", "uniform", "HGPrompt", "HGPrompt λ=0")
    assert comparison.curves.shape == (2, 2, 5)
    assert comparison.num_classes == 16
    assert bool((comparison.curves >= 0).all())
    assert bool((comparison.curves <= 1).all())
    assert [p.name for p in tmp_path.iterdir()] == ["pool.safetensors"]  # no checkpoint is left
    again = run_demo(vit, SMALL, tmp_path)[1]
    assert torch.equal(again.curves, comparison.curves)


def test_goes_on_where_it_was_interrupted(vit, whole, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage.startswith("seed 2"):
            raise Stop

    with pytest.raises(Stop):
        run_demo(vit, SMALL, tmp_path, progress=stop)
    assert len(list(tmp_path.glob(".hgprompt-demo-*"))) == 1
    other = tmp_path / ".hgprompt-demo-00000000"  # what another plan left is not in the way, and stays
    other.mkdir()
    assert torch.equal(run_demo(vit, SMALL, tmp_path)[1].curves, whole[2].curves)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [other.name]


def test_command(tmp_path, monkeypatch, capsys):
    from hgprompt import cli

    # With the bundled network, on images of 64 pixels; a target of few classes, so that few images do.
    plan = dataclasses.replace(SMALL, target="nearest-distance", images=12, epochs=1)
    monkeypatch.setitem(PLANS, "quick", plan)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["hgprompt", "demo", "--quick", "--quiet", "--device", "cpu", "--out", "here"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    out = capsys.readouterr().out
    for word in ("random", "best single by H", "uniform", "HGPrompt", "demo.png", "2 seeds"):
        assert word in out
    record = json.loads((tmp_path / "here" / "demo.json").read_text())
    assert record["plan"] == json.loads(json.dumps(dataclasses.asdict(plan)))
    assert len(record["accuracy"][0]) == 2
    assert (tmp_path / "here" / "demo.png").stat().st_size > 10_000
    assert EnsembleResult.load(tmp_path / "here" / "ensemble").n_images == 12


def test_a_pool_of_another_origin_is_not_overwritten(vit, tmp_path):
    path = tmp_path / "pool.safetensors"
    PromptPool({"mine": torch.zeros(2, 192)}, metadata={"mine": {"task": "fruit"}}).save(path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="no demo has made"):
        run_demo(vit, SMALL, tmp_path)
    assert path.read_bytes() == before


def test_unknown_target(vit, tmp_path):
    with pytest.raises(OptionError, match="no procedural task"):
        run_demo(vit, dataclasses.replace(SMALL, target="dance"), tmp_path)
