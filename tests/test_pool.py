"""PromptPool: names, provenance, backbone check, files."""

from __future__ import annotations

import dataclasses

import literal
import pytest
import torch
from safetensors.torch import save_file

from hgprompt.backbone import FrozenViT
from hgprompt.errors import FileFormatError, HGPromptWarning, PromptError
from hgprompt.files import read_safetensors, write_safetensors
from hgprompt.pool import BackboneInfo, PromptPool

INFO = BackboneInfo("vit_x", "ab" * 32, 6, 3, (32, 32))


def _pool(**options):
    g = torch.Generator().manual_seed(0)
    prompts = {name: torch.randn(4, 6, generator=g) for name in ("cats", "dogs", "birds")}
    metadata = {"cats": {"task": "cats", "init_seed": 3, "training": {"epochs": 10}}}
    return PromptPool(prompts, **({"backbone": INFO, "metadata": metadata} | options))


def test_preprocessing_is_remembered(tmp_path):
    """Mean, std and resize filter go with the pool; another one is a warning, for its prompts mean less then."""
    info = dataclasses.replace(INFO, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0), interpolation="bilinear")
    _pool(backbone=info).save(tmp_path / "pool.safetensors")
    again = PromptPool.load(tmp_path / "pool.safetensors")
    assert again.backbone == info
    again.check_backbone(info)
    again.check_backbone(INFO)  # not recorded: nothing to compare
    with pytest.warns(HGPromptWarning, match=r"mean \(0\.1"):
        again.check_backbone(dataclasses.replace(info, mean=(0.5, 0.5, 0.5)))
    for bad in ({"mean": "0.5"}, {"std": [1e9]}, {"mean": []}, {"interpolation": 3}):
        with pytest.raises(FileFormatError):
            BackboneInfo.from_dict(INFO.to_dict() | bad)


def test_round_trip_is_exact(tmp_path):
    for pool in (_pool(), PromptPool(torch.randn(2, 3, 4, 6, dtype=torch.float64)), _pool(backbone=None)):
        pool.save(tmp_path / "pool.safetensors")
        loaded = PromptPool.load(tmp_path / "pool.safetensors")
        assert loaded.names == pool.names
        assert torch.equal(loaded.stack(), pool.stack())
        assert loaded.stack().dtype == pool.stack().dtype
        assert loaded.backbone == pool.backbone
        assert loaded.metadata == pool.metadata


def test_mapping_and_views():
    pool = _pool()
    assert (len(pool), pool.names, list(pool)) == (3, ("cats", "dogs", "birds"), ["cats", "dogs", "birds"])
    assert (pool.num_tokens, pool.width, pool.is_deep) == (4, 6, False)
    assert torch.equal(pool.stack()[1], pool["dogs"])
    assert "cats" in pool
    assert pool.get("fish") is None
    assert pool.subset(["birds", "cats"]).names == ("birds", "cats")
    assert pool.without("cats").names == ("dogs", "birds")
    assert pool.subset(["cats"]).metadata["cats"]["init_seed"] == 3
    assert "3 prompts of 4×6" in repr(pool)
    with pytest.raises(PromptError, match="did you mean 'cats'"):
        pool["cat"]
    with pytest.raises(KeyError):
        pool["fish"]
    with pytest.raises(PromptError, match="no prompt is named 'fish'"):
        pool.without("fish")


def test_prompts_are_copies():
    tensor = torch.zeros(2, 4, 6)
    pool = PromptPool(tensor)
    tensor += 1
    assert float(pool.stack().abs().sum()) == 0


def test_merge():
    other = PromptPool({"fish": torch.ones(4, 6)}, backbone=INFO)
    assert _pool().merge(other).names == ("cats", "dogs", "birds", "fish")
    with pytest.raises(PromptError, match="both pools"):
        _pool().merge(_pool())
    with pytest.raises(PromptError, match="tuned for backbone"):
        _pool().merge(PromptPool({"fish": torch.ones(4, 6)}, backbone=BackboneInfo("y", "cd" * 32, 6, 3, (32, 32))))


def test_backbone_check():
    pool = _pool()
    pool.check_backbone(INFO)
    pool.check_backbone(BackboneInfo("renamed", INFO.fingerprint, 6, 3, (64, 64)))
    pool.check_backbone(BackboneInfo("vit_x", "", 6, 3, (32, 32)))
    _pool(backbone=None).check_backbone(BackboneInfo("y", "cd", 6, 9, (32, 32)))
    for other in (
        BackboneInfo("vit_x", "cd" * 32, 6, 3, (32, 32)),
        BackboneInfo("vit_x", INFO.fingerprint, 6, 4, (32, 32)),
    ):
        with pytest.raises(PromptError, match="tuned for backbone vit_x"):
            pool.check_backbone(other)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompts"),
        ([], "no prompts"),
        (torch.zeros(0, 4, 6), "no prompts"),
        ({"a": [1, 2]}, "list"),
        ({"a": torch.zeros(6)}, r"\[6\]"),
        ({"a": torch.zeros(4, 6, dtype=torch.int64)}, "int64"),
        ({"a": torch.zeros(4, 6), "b": torch.zeros(5, 6)}, "'b' is"),
        ({"a": torch.zeros(0, 6)}, "empty"),
        ({"a": torch.full((4, 6), torch.nan)}, "'a' holds NaN"),
        ({"": torch.zeros(4, 6)}, "printable"),
        ({"a" * 201: torch.zeros(4, 6)}, "printable"),
        ({"a\x1b[31m": torch.zeros(4, 6)}, "printable"),
        ({3: torch.zeros(4, 6)}, "printable"),
        (torch.zeros(4, 6), r"\[M, p, d\]"),
        ("pool.safetensors", "PromptPool.load"),
        (5, "int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_prompts(prompts, message):
    with pytest.raises(PromptError, match=message):
        PromptPool(prompts)


def test_bad_provenance():
    with pytest.raises(PromptError, match="not here"):
        _pool(metadata={"fish": {}})
    with pytest.raises(PromptError, match="JSON"):
        _pool(metadata={"cats": {"x": torch.zeros(1)}})
    with pytest.raises(PromptError, match="do not fit"):
        _pool(backbone=BackboneInfo("y", "", 7, 3, (32, 32)))


CHANGES = {
    "format": {"format": "other"},
    "version": {"version": 2},
    "names missing": {"names": ["cats"]},
    "names twice": {"names": ["cats", "cats", "dogs"]},
    "names no list": {"names": 5},
    "records": {"prompts": [1]},
    "record": {"prompts": {"cats": 1}},
    "backbone empty": {"backbone": {}},
    "backbone number": {"backbone": 3},
    "backbone size": {"backbone": INFO.to_dict() | {"image_size": [1, 2, 3]}},
    "backbone width": {"backbone": INFO.to_dict() | {"width": "6"}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_files_that_are_no_pool(tmp_path, change):
    path = tmp_path / "pool.safetensors"
    _pool().save(path)
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, tensors, metadata | change)
    with pytest.raises(FileFormatError):
        PromptPool.load(path)


def test_foreign_file_and_bad_values(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "x")
    with pytest.raises(FileFormatError, match="no prompt pool"):
        PromptPool.load(tmp_path / "x")
    _pool().save(tmp_path / "x")
    tensors, metadata = read_safetensors(tmp_path / "x")
    tensors["prompts.dogs"][0, 0] = torch.inf
    write_safetensors(tmp_path / "x", tensors, metadata)
    with pytest.raises(PromptError, match="'dogs' holds NaN or infinity"):
        PromptPool.load(tmp_path / "x")


def test_a_pool_of_a_pool_keeps_its_provenance():
    pool = _pool()
    again = PromptPool(pool)
    assert again == pool
    assert again.backbone == pool.backbone
    assert again.metadata == pool.metadata
    changed = {name: prompt + 1 for name, prompt in pool.items()}
    others = (pool.without(pool.names[0]), PromptPool(changed, backbone=pool.backbone, metadata=pool.metadata))
    assert all(pool != other for other in (*others, PromptPool(dict(pool)), dict(pool)))


@pytest.mark.parametrize(
    "record", [{"task": "caf\udce9"}, {1: 2, "1": 3}, {"loss": float("nan")}, {"task": {1, 2}}], ids=repr
)
def test_metadata_that_no_file_can_hold(record):
    with pytest.raises(PromptError, match="JSON-able"):
        PromptPool({"a": torch.ones(2, 4)}, metadata={"a": record})


def test_metadata_is_what_its_file_gives_back(tmp_path):
    deep = {}
    for _ in range(59):
        deep = {"deeper": deep}
    inner = {"betas": (0.9, 0.99), "classes": {1: "one"}}
    pool = PromptPool({"a": torch.ones(2, 4)}, metadata={"a": {"training": inner, "deep": deep}})
    inner["betas"] = ()
    pool.save(tmp_path / "pool.safetensors")
    assert PromptPool.load(tmp_path / "pool.safetensors") == pool
    assert pool.metadata["a"]["training"] == {"betas": [0.9, 0.99], "classes": {"1": "one"}}
    with pytest.raises(PromptError, match="deep"):
        PromptPool({"a": torch.ones(2, 4)}, metadata={"a": {"deep": {"deeper": {"deeper": deep}}}})


def test_a_network_is_a_backbone():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    assert PromptPool([torch.zeros(2, 16)], backbone=vit) == PromptPool([torch.zeros(2, 16)], backbone=vit.info)


@pytest.mark.parametrize(
    "options", [{"backbone": "mini"}, {"metadata": {"prompt_0": "hi"}}, {"metadata": [{}]}], ids=str
)  # fmt: skip
def test_provenance_of_another_kind(options):
    with pytest.raises(PromptError, match=next(iter(options))):
        PromptPool([torch.zeros(2, 16)], **options)
