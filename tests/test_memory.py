"""What statistics take, said beforehand: against what they took, and refused where there is no room."""

from __future__ import annotations

import pytest
import torch

import hgprompt
from hgprompt import EnsembleStatistics, StatisticsError, memory

M, H, C = 3, 8, 4


def _batch(n=20, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) // 4 % C  # every class in every fold
    return torch.randn(M, n, H, generator=g).to(dtype), labels


@pytest.mark.parametrize("folds", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_footprint_is_what_is_kept(folds, dtype):
    features, labels = _batch(dtype=dtype)
    sizes = hgprompt.footprint(M, H, 20, num_classes=C, folds=folds, itemsize=dtype.itemsize)
    for kind, size in sizes.items():
        statistics = EnsembleStatistics(folds=folds, keep=kind)
        statistics.update(features, labels)
        beside = 20 * (8 + 4) if kind == "features" else 0  # each image's label and fold
        assert statistics.nbytes == size.kept + beside
        assert size.peak > size.kept


def test_known_length_decides_with_the_first_batch():
    """Moments (10 kB here, whatever N) are smaller than 1000 images of features and larger than 20."""
    features, labels = _batch()
    for expected, kept in ((20, "features"), (1000, "moments")):
        statistics = EnsembleStatistics()
        statistics.expect(expected)
        statistics.update(features, labels)
        assert statistics.keeps == kept


@pytest.mark.parametrize("keep", ["auto", "features", "moments"])
def test_too_little_room_is_refused_with_advice(keep):
    features, labels = _batch()
    smallest = min(size.peak for size in hgprompt.footprint(M, H, 1000, num_classes=C, folds=1).values())
    statistics = EnsembleStatistics(keep=keep, max_bytes=smallest - 1)
    statistics.expect(1000)
    with pytest.raises(StatisticsError, match=r"3 prompts and 1000 images take .* fewer images") as error:
        statistics.update(features, labels)
    said = [kind for kind in ("as features", "as moments") if kind in str(error.value)]
    assert said == (["as features", "as moments"] if keep == "auto" else [f"as {keep}"])
    assert statistics.num_images == 0


def test_a_stream_of_unknown_length_moves_to_moments_where_only_they_have_room():
    """Features double in the solve: moments are the only way out before they are the smaller of the two."""
    features, labels = _batch()
    moments = hgprompt.footprint(M, H, 0, num_classes=C, folds=1)["moments"]
    statistics = EnsembleStatistics(max_bytes=moments.peak)
    seen = 0
    while statistics.keeps == "features":
        statistics.update(features, labels)
        seen += 20
        assert seen < 2000
    before = hgprompt.footprint(M, H, seen - 20, num_classes=C, folds=1)["features"]
    now = hgprompt.footprint(M, H, seen, num_classes=C, folds=1)["features"]
    assert before.peak <= moments.peak
    assert now.peak > moments.peak or now.kept > moments.kept


def test_merging_is_refused_before_anything_changes():
    features, labels = _batch()
    one, other = EnsembleStatistics(keep="features", max_bytes=10_000), EnsembleStatistics(keep="features")
    one.update(features, labels)
    for _ in range(20):
        other.update(features, labels)
    with pytest.raises(StatisticsError, match="10 kB can be had"):
        one.merge(other)
    assert one.num_images == 20
    assert other.num_images == 400


def test_memory_of_the_machine(tmp_path, monkeypatch):
    assert memory.available_bytes(torch.device("cpu")) > 2**20  # else nothing would run here
    assert memory.available_bytes(torch.device("meta")) is None
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 200000\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", ((str(tmp_path), "memory.max", "memory.current"),))
    assert memory.available_bytes(torch.device("cpu")) == 240_000  # 0.8 · (1,000,000 - 900,000 + 200,000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(torch.device("cpu")) > 2**20


def test_bytes_in_words():
    assert [memory.in_words(n) for n in (12, 83_968, 4_300_000_000)] == ["12 bytes", "84 kB", "4.3 GB"]
