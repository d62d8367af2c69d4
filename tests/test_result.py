"""EnsembleResult on disk and on paper."""

from __future__ import annotations

import dataclasses
import json
import os

import literal
import pytest
import torch

from hgprompt import EnsembleResult, fast_ensemble
from hgprompt.errors import FileFormatError, OutputError
from hgprompt.files import read_safetensors, write_safetensors


@pytest.fixture(scope="module")
def result():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    images = torch.randn(40, 3, 16, 16, generator=g) + labels[:, None, None, None]
    prompts = {"cats": torch.randn(2, 16, generator=g), "dogs [bold]": torch.randn(2, 16, generator=g)}
    return fast_ensemble(prompts, [(images, labels)], backbone=literal.tiny_vit())


@pytest.fixture(scope="module")
def result_without_gradients():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(9) % 3
    images = torch.randn(9, 3, 16, 16, generator=g)
    prompts = torch.randn(2, 2, 16, generator=g)
    return fast_ensemble(prompts, [(images, labels)], backbone=literal.tiny_vit(), lam=0, gradient_images=0)


def test_round_trip(result, result_without_gradients, tmp_path):
    for case in (result, result_without_gradients):
        case.save(tmp_path / "new" / "folder")
        loaded = EnsembleResult.load(tmp_path / "new" / "folder")
        for field in dataclasses.fields(case):
            ours, theirs = getattr(case, field.name), getattr(loaded, field.name)
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
            elif ours == ours:
                assert theirs == ours, field.name
            else:
                assert theirs != theirs, field.name
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["ensemble.safetensors", "report.json"]
    report = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert sum(report["weights"].values()) == pytest.approx(1)


def test_text_says_the_weights(result):
    assert "cats" in str(result)
    assert "at most 2" in str(result)


def test_a_file_by_another_name(result, tmp_path):
    result.save(tmp_path)
    renamed = (tmp_path / "ensemble.safetensors").rename(tmp_path / "mine.safetensors")
    assert torch.equal(EnsembleResult.load(renamed).weights, result.weights)


def test_damaged_and_foreign_files(result, tmp_path):
    with pytest.raises(FileFormatError, match="does not exist"):
        EnsembleResult.load(tmp_path)
    path = tmp_path / "ensemble.safetensors"
    result.save(tmp_path)
    tensors, record = read_safetensors(path)
    write_safetensors(path, tensors, record | {"format": "other"})
    with pytest.raises(FileFormatError, match="no hgprompt ensemble"):
        EnsembleResult.load(tmp_path)
    write_safetensors(path, tensors, {k: v for k, v in record.items() if k != "gap"})
    with pytest.raises(FileFormatError, match="gap"):
        EnsembleResult.load(tmp_path)
    write_safetensors(path, tensors | {"weights": torch.ones(5)}, record)
    with pytest.raises(FileFormatError, match="weights is"):
        EnsembleResult.load(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match="truncated"):
        EnsembleResult.load(tmp_path)


HARMFUL = {
    "NaN weights": lambda t, r: t | {"weights": t["weights"] * torch.nan},
    "weights off the simplex": lambda t, r: t | {"weights": t["weights"] * 2},
    "negative weights": lambda t, r: t | {"weights": torch.tensor([2.0, -1.0], dtype=torch.float64)},
    "integer weights": lambda t, r: t | {"weights": torch.tensor([1, 0])},
    "NaN prompt": lambda t, r: t | {"prompt": t["prompt"] * torch.inf},
    "prompt of another backbone": lambda t, r: t | {"prompt": torch.zeros(2, 17)},
    "prompt of one dimension": lambda t, r: t | {"prompt": torch.zeros(16)},
    "another tensor": lambda t, r: t | {"more": torch.zeros(3)},
    "no number": lambda t, r: r | {"h_score": True},
    "a number beyond float64": lambda t, r: r | {"h_score": 10**400},
    "half an image": lambda t, r: r | {"n_images": 1.5},
    "one name for two": lambda t, r: r | {"names": ["a", "a"]},
    "a name that steers": lambda t, r: r | {"names": ["a", "\x1b[2J"]},
    "no names": lambda t, r: r | {"names": []},
    "more classes than there are": lambda t, r: r | {"n_classes": 1},
    "a negative gap": lambda t, r: r | {"gap": -5.0},
    "a negative H": lambda t, r: r | {"h_score": -5.0},
    "no class": lambda t, r: r | {"classes": [-1]},
    "a reason that steers": lambda t, r: r | {"stop_reason": "\x1b[2J"},
}


@pytest.mark.parametrize("change", HARMFUL.values(), ids=HARMFUL)
def test_harmful_files(result, tmp_path, change):
    result.save(tmp_path)
    path = tmp_path / "ensemble.safetensors"
    tensors, record = read_safetensors(path)
    changed = change(tensors, record)
    is_record = "format" in changed
    write_safetensors(path, tensors if is_record else changed, changed if is_record else record)
    with pytest.raises(FileFormatError):
        EnsembleResult.load(tmp_path)


def test_unwritable_places(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make"):
        result.save(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="missing"):
        result.plot(tmp_path / "missing" / "plot.png")
    with pytest.raises(OutputError, match="figure"):
        result.plot(tmp_path / "plot.magic")


def test_plots(result, result_without_gradients, tmp_path):
    for i, case in enumerate((result, result_without_gradients)):
        case.plot(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000


def test_best_single(result):
    scores = dict(zip(result.names, result.source_h_scores.tolist(), strict=True))
    assert scores[result.best_single] == max(scores.values())
    tied = dataclasses.replace(result, source_h_scores=torch.ones_like(result.source_h_scores))
    assert tied.best_single == result.names[0]
