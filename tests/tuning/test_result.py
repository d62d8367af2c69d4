"""TuneResult on disk: the same when read back, and refused when it is anything else."""

from __future__ import annotations

import dataclasses
import json
import math

import literal
import pytest
import torch

from hgprompt import FrozenViT, OutputError
from hgprompt.data import LabelledImages
from hgprompt.errors import FileFormatError, OptionError
from hgprompt.files import read_safetensors, write_safetensors
from hgprompt.plots import plot_tuning
from hgprompt.tuning import TuneConfig, TuneResult, random_prompt, tune


@pytest.fixture(scope="module")
def result():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=g, dtype=torch.uint8)
    images = LabelledImages("birds", pixels, torch.arange(12) % 2, ("owl", "wren"))
    starts = {"a": random_prompt(vit, 2, seed=0), "b": random_prompt(vit, 2, seed=1)}
    return tune(vit, starts, images, test=images, config=TuneConfig(epochs=3, batch_size=4), evaluate_every=2)


def test_round_trip(result, tmp_path):
    files = result.save(tmp_path / "new" / "place")
    again = TuneResult.load(tmp_path / "new" / "place")
    for name in ("prompts", "head_weight", "head_bias"):
        assert torch.equal(getattr(again, name), getattr(result, name))
    for name in ("names", "history", "config", "task", "class_names", "backbone"):
        assert getattr(again, name) == getattr(result, name)
    assert json.loads(files[1].read_text())["class_names"] == ["owl", "wren"]
    assert again.accuracy("b") == result.history[-1]["test_accuracy"][1]
    assert torch.equal(again.prompt("b"), result.prompts[1])
    for ask in (again.prompt, again.accuracy):
        with pytest.raises(OptionError, match="no run is called 'c'"):
            ask("c")
    # How long it took is no part of the files: a run that was interrupted writes what an undisturbed one does.
    assert math.isnan(again.seconds)
    dataclasses.replace(result, seconds=1e9).save(tmp_path / "slower")
    for file in files:
        assert (tmp_path / "slower" / file.name).read_bytes() == file.read_bytes()


def test_refuses_other_files(result, tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        TuneResult.load(tmp_path)
    write_safetensors(tmp_path / "tuned.safetensors", {}, {})
    with pytest.raises(FileFormatError, match="no tuned prompt"):
        TuneResult.load(tmp_path)
    result.save(tmp_path)
    tensors, record = read_safetensors(tmp_path / "tuned.safetensors")
    for broken_tensors, broken_record in (
        (tensors, record | {"history": [{}]}),
        (tensors, record | {"history": [record["history"][0] | {"loss": ["low", "low"]}]}),
        ({k: v for k, v in tensors.items() if k != "head_bias"}, record),
        (tensors | {"head_bias": torch.zeros(5)}, record),
        (tensors, record | {"names": ["a"]}),
        (tensors, record | {"history": []}),
        (tensors, record | {"config": {"epochs": -1}}),
        (tensors, record | {"backbone": None}),
        (tensors | {"prompts": tensors["prompts"] * math.inf}, record),
        (tensors | {"head_bias": tensors["head_bias"].to(torch.int64)}, record),
        (tensors, record | {"class_names": ["owl"]}),
        (tensors, record | {"class_names": "ow"}),
        (tensors, record | {"names": ["a", "a"]}),
        (tensors, record | {"names": ["a", "\x1b[2J"]}),
        (tensors, record | {"task": {}}),
        (tensors, record | {"history": [record["history"][0] | {"loss": [10**400, 1.0]}]}),
    ):
        write_safetensors(tmp_path / "tuned.safetensors", broken_tensors, broken_record)
        with pytest.raises(FileFormatError, match="tuned"):
            TuneResult.load(tmp_path)


def test_plot(result, tmp_path):
    plot_tuning(result, tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(OutputError):
        plot_tuning(result, tmp_path / "missing" / "tuning.png")
    with pytest.raises(OutputError, match="cannot write the figure"):
        plot_tuning(result, tmp_path / "tuning.magic")
    assert [p.name for p in tmp_path.iterdir()] == ["tuning.png"]
