"""Streaming statistics: any batch size, order, split and representation give the literal float64 formula."""

from __future__ import annotations

import copy

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hgprompt.errors import DataError, OptionError, StatisticsError
from hgprompt.moments import Moments
from hgprompt.objective import HScore
from hgprompt.sample import folds_of
from hgprompt.statistics import EnsembleStatistics

M, H, C = 3, 5, 4


def _data(n=60, m=M, h=H, c=C, seed=0, dtype=torch.float64, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, c, (n,), generator=g)
    labels[:c] = torch.arange(c)
    features = torch.randn(m, n, h, generator=g, dtype=torch.float64) + offset
    features += 0.7 * torch.randn(m, c, h, generator=g, dtype=torch.float64)[:, labels]
    return features.to(dtype), labels


def _stream(features, labels, sizes, **options):
    statistics = EnsembleStatistics(**options)
    start = 0
    for size in sizes:
        statistics.update(features[:, start : start + size], labels[start : start + size])
        start += size
    return statistics


def _literal(features, labels, weights, intensity):
    mixed = np.tensordot(np.asarray(weights), features.double().numpy(), axes=1)
    return literal.h_score(mixed, labels.numpy(), intensity)


def _shifted(counts):
    """The same sum, with a class that has fewer images than none."""
    first, second, *_ = counts
    return counts | {first: -1, second: counts[second] + counts[first] + 1}


WEIGHTS = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_batches_and_order_give_the_literal_value(data):
    features, labels = _data()
    keep = data.draw(st.sampled_from(["features", "moments", "auto"]))
    intensity = data.draw(st.sampled_from([0.0, 0.01, 0.5]))
    cuts = sorted(data.draw(st.lists(st.integers(0, 60), max_size=6)))
    sizes = np.diff([0, *cuts, 60]).tolist()
    order = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).permutation(60))
    statistics = _stream(features[:, order], labels[order], sizes, keep=keep)
    expected = _literal(features, labels, WEIGHTS, intensity)
    assert statistics.h_score(WEIGHTS, shrinkage=intensity) == pytest.approx(expected, rel=1e-10)
    assert statistics.num_images == 60
    assert statistics.classes == (0, 1, 2, 3)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize(("n", "h"), [(200, 8), (20, 40), (9, 8), (8, 8)], ids=str)
def test_float32_features_stream_to_1e_6(keep, n, h):
    features, labels = _data(n=n, h=h, dtype=torch.float32, offset=10.0)
    statistics = _stream(features, labels, [3] * 100, keep=keep)
    # The statistics take float32 in and lose nothing from there on.
    assert statistics.h_score(WEIGHTS, shrinkage=0.1) == pytest.approx(
        _literal(features, labels, WEIGHTS, 0.1), rel=1e-6
    )


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_mean_far_from_zero(keep):
    features, labels = _data(n=100, offset=0.0)
    far = features + 1e4
    near, moved = (_stream(f, labels, [30, 70], keep=keep).h_score(WEIGHTS, shrinkage=0.1) for f in (features, far))
    assert moved == pytest.approx(near, rel=1e-9)  # 1e4 costs four digits of float64's sixteen, twice


@pytest.mark.parametrize(
    "kinds",
    [("features", "features"), ("features", "moments"), ("moments", "features"), ("moments", "moments")],
)
@pytest.mark.parametrize("folds", [1, 3])
def test_merging_two_halves_equals_the_whole(kinds, folds):
    features, labels = _data()
    first = _stream(features[:, :24], labels[:24], [10, 14], keep=kinds[0], folds=folds)
    second = _stream(features[:, 24:], labels[24:], [36], keep=kinds[1], folds=folds, shard=(24, 1))
    whole = _stream(features, labels, [60], keep="features", folds=folds)
    before = second.h_score(WEIGHTS, shrinkage=0.1)
    first.merge(second)
    assert second.h_score(WEIGHTS, shrinkage=0.1) == before
    assert first.num_images == 60
    for shrinkage in (0.1, "ledoit-wolf", "oas"):
        assert first.h_score(WEIGHTS, shrinkage=shrinkage) == pytest.approx(
            whole.h_score(WEIGHTS, shrinkage=shrinkage), rel=1e-9
        )
    for k in range(folds) if folds > 1 else []:
        ours, theirs = (HScore(s, shrinkage=0.1, without_fold=k)(WEIGHTS.numpy())[0] for s in (first, whole))
        assert ours == pytest.approx(theirs, rel=1e-9)
    empty = EnsembleStatistics(folds=folds)
    empty.merge(whole)
    whole.merge(EnsembleStatistics(folds=folds))
    assert empty.h_score(WEIGHTS) == pytest.approx(whole.h_score(WEIGHTS), rel=1e-12)


def test_folds_partition_the_stream():
    features, labels = _data(n=24)
    statistics = _stream(features, labels, [5, 7, 12], folds=4, keep="features")
    left, left_labels = statistics.features_and_labels(without_fold=1)
    chosen = torch.from_numpy(folds_of(np.arange(24), 4)) != 1
    assert torch.equal(left, features[:, chosen])
    assert torch.equal(left_labels, labels[chosen])


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_state_dict_round_trip(keep):
    features, labels = _data(dtype=torch.float32)
    statistics = _stream(features[:, :40], labels[:40], [40], keep=keep, folds=2)
    restored = EnsembleStatistics(folds=2, keep=keep)
    restored.load_state_dict(statistics.state_dict())
    for s in (statistics, restored):
        s.update(features[:, 40:], labels[40:])
    assert restored.h_score(WEIGHTS) == statistics.h_score(WEIGHTS)
    assert (restored.classes, restored.nbytes, restored.dtype) == (
        statistics.classes,
        statistics.nbytes,
        torch.float32,
    )
    with pytest.raises(StatisticsError, match="folds"):
        EnsembleStatistics(folds=3).load_state_dict(statistics.state_dict())
    broken = statistics.state_dict() | {"num_images": 7}
    with pytest.raises(StatisticsError, match="contradicts"):
        EnsembleStatistics(folds=2).load_state_dict(broken)


def test_the_smaller_representation_is_kept():
    features, labels = _data(n=400)
    statistics = EnsembleStatistics()
    kinds = []
    for i in range(0, 400, 10):
        statistics.update(features[:, i : i + 10], labels[i : i + 10])
        kinds.append(statistics.keeps)
        assert statistics.nbytes <= max(Moments.bytes_for(M, H, C), features[:, : i + 10].nbytes + 12 * (i + 10))
    assert kinds[0] == "features"
    assert kinds[-1] == "moments"
    assert statistics.nbytes == Moments.bytes_for(M, H, C)


def test_moments_of_one_prompt_and_of_the_mixture():
    features, labels = _data()
    joint = _stream(features, labels, [60], keep="moments", folds=2)
    kept = _stream(features, labels, [60], keep="features", folds=2)
    for ours, theirs in [
        (joint.prompt_moments(1), kept.prompt_moments(1)),
        (joint.mixture_moments(), kept.mixture_moments()),
    ]:
        for a, b in zip(ours, theirs, strict=True):
            about_mean = [
                x.quadratic(torch.ones(1)) / x.count - torch.outer(*[x.sums[0] / x.count] * 2) for x in (a, b)
            ]
            torch.testing.assert_close(*about_mean, rtol=1e-10, atol=1e-12)
            assert a.class_counts == b.class_counts


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), StatisticsError, r"\[M, B, h\]"),
        (torch.zeros(3, 4, 5).numpy(), torch.zeros(4, dtype=torch.int64), StatisticsError, "ndarray"),
        (torch.zeros(3, 4, 5), torch.zeros(4), DataError, "integer"),
        (torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.bool), DataError, "integer"),
        (torch.zeros(3, 4, 5), torch.zeros(3, dtype=torch.int64), DataError, r"\[4\]"),
        (torch.zeros(3, 4, 5), torch.full((4,), -1), DataError, "-1"),
        (torch.zeros(3, 4, 5), [0, 1, 0, 1], DataError, "list"),
        (
            torch.full((3, 4, 5), torch.nan, dtype=torch.float64),
            torch.zeros(4, dtype=torch.int64),
            DataError,
            "not finite",
        ),
        (torch.zeros(2, 4, 5), torch.zeros(4, dtype=torch.int64), StatisticsError, "earlier batches"),
    ],
)
def test_bad_batches_change_nothing(features, labels, error, message):
    statistics = _stream(*_data(n=8), [8])
    with pytest.raises(error, match=message):
        statistics.update(features, labels)
    assert statistics.num_images == 8


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_batch_may_be_written_over_afterwards(keep):
    features, labels = _data()
    kept, buffer, answers = EnsembleStatistics(keep=keep), torch.empty_like(features[:, :20]), labels[:20].clone()
    for start in (0, 20, 40):
        buffer.copy_(features[:, start : start + 20])
        answers.copy_(labels[start : start + 20])
        kept.update(buffer, answers)
    assert kept.h_score(WEIGHTS) == _stream(features, labels, [20, 20, 20], keep=keep).h_score(WEIGHTS)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_state_is_a_snapshot(keep):
    """Neither the statistics that it is of nor those that it was loaded into change it."""
    features, labels = _data()
    first = _stream(features[:, :40], labels[:40], [40], keep=keep)
    state, expected = first.state_dict(), first.h_score(WEIGHTS)
    first.update(features[:, 40:], labels[40:])
    for _ in range(2):
        loaded = EnsembleStatistics(keep=keep)
        loaded.load_state_dict(state)
        assert loaded.h_score(WEIGHTS) == expected
        loaded.update(features[:, 40:], labels[40:])


def test_a_merge_that_has_no_room_changes_nothing():
    empty, full = EnsembleStatistics(max_bytes=10), _stream(*_data(), [60])
    with pytest.raises(StatisticsError):
        empty.merge(full)
    assert empty.state_dict() == EnsembleStatistics().state_dict()
    # What the other keeps is what will be kept: moments, which are larger here.
    room = 3 * 120 * M * 80 * 8
    features = _stream(*_data(h=80), [60], keep="features", max_bytes=room)
    with pytest.raises(StatisticsError, match="can be had"):
        features.merge(_stream(*_data(h=80, seed=1), [60], keep="moments"))
    assert features.keeps == "features"
    assert features.num_images == 60


def test_one_stream_has_one_dtype():
    """Else a state would hold features that no state may hold."""
    features, labels = _data(dtype=torch.bfloat16)
    statistics = _stream(features, labels, [60])
    with pytest.raises(StatisticsError, match=r"float32, earlier batches .*bfloat16"):
        statistics.update(features.float(), labels)
    with pytest.raises(StatisticsError, match=r"cannot merge .*float32"):
        statistics.merge(_stream(features.float(), labels, [60]))
    assert statistics.num_images == 60


@pytest.mark.parametrize(
    ("keep", "change"),
    [
        ("moments", lambda s: s.update(shape=(7, 9))),
        ("moments", lambda s: s["moments"][0].update(rows=s["moments"][0]["rows"][:1])),
        ("moments", lambda s: s["moments"][0].update(class_sums={-1: torch.zeros_like(s["moments"][0]["sums"])})),
        ("features", lambda s: s.update(dtype="float16")),
        ("moments", lambda s: s["moments"][0].update(rows=[row.float() for row in s["moments"][0]["rows"]])),
        ("moments", lambda s: s["moments"][0].update(centre=s["moments"][0]["centre"][:, :2])),
        ("moments", lambda s: s["moments"][0].update(centre=None)),
        ("moments", lambda s: s["moments"][0].update(third=torch.zeros(2, dtype=torch.float64))),
        ("moments", lambda s: s["moments"][0]["class_sums"].popitem()),
        ("moments", lambda s: s["moments"][0].update(class_counts=_shifted(s["moments"][0]["class_counts"]))),
    ],
    ids=["shape", "rows", "negative label", "dtype", "float32 rows", "centre", "no centre", "third", "class", "counts"],
)
def test_states_that_contradict_themselves(keep, change):
    state = copy.deepcopy(_stream(*_data(), [60], keep=keep).state_dict())
    EnsembleStatistics(keep=keep).load_state_dict(state)
    change(state)
    with pytest.raises(StatisticsError, match=r"^state "):
        EnsembleStatistics(keep=keep).load_state_dict(state)


def test_empty_statistics_and_bad_options():
    for options in ({"folds": 2.5}, {"folds": "8"}, {"max_bytes": "1"}, {"shard": (-1, 2)}, {"shard": (0, 0)}):
        with pytest.raises(OptionError, match=next(iter(options))):
            EnsembleStatistics(**options)
    with pytest.raises(StatisticsError, match=r"\[0, 4, 5\]"):
        EnsembleStatistics().update(torch.zeros(0, 4, 5), torch.arange(4))
    with pytest.raises(StatisticsError, match="empty"):
        EnsembleStatistics().h_score(WEIGHTS)
    with pytest.raises(OptionError, match="folds"):
        EnsembleStatistics(folds=0)
    with pytest.raises(OptionError, match="keep"):
        EnsembleStatistics(keep="both")
    with pytest.raises(StatisticsError, match="cannot merge"):
        _stream(*_data(), [60]).merge(_stream(*_data(m=2), [60]))
    of_moments = _stream(*_data(), [60], keep="moments")
    with pytest.raises(StatisticsError, match="no longer kept"):
        of_moments.features_and_labels()
    with pytest.raises(StatisticsError, match="no longer kept"):
        _ = of_moments.fold_of
    with pytest.raises(OptionError, match="weights"):
        _stream(*_data(), [60]).h_score(torch.ones(2))


def test_a_first_batch_that_is_refused_leaves_no_shape_behind():
    statistics = EnsembleStatistics()
    labels = torch.arange(4) % 2
    with pytest.raises(DataError, match="not finite"):
        statistics.update(torch.full((3, 4, 5), torch.nan), labels)
    features = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics.update(features, labels)
    assert torch.equal(statistics.features_and_labels()[0], features)
    assert statistics.dtype == torch.float64


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None}, {"dtype": "nn"}, {"dtype": "int64"}, {"dtype": 3}, {"num_images": "many"}, {"shape": (1,)},
        {"labels": torch.zeros(12)}, {"fold_of": torch.full((12,), 9)}, {"fold_of": torch.zeros(12)},
        *({name: ...} for name in ("labels", "features", "fold_of", "num_images", "dtype", "shape")),
    ],
    ids=str,
)  # fmt: skip
def test_states_that_are_none(change):
    """`...` stands for a key that is not there."""
    statistics = EnsembleStatistics(folds=2, keep="features")
    statistics.update(torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2)
    state = {k: v for k, v in (statistics.state_dict() | change).items() if v is not ...}
    with pytest.raises(StatisticsError, match=r"^state "):
        EnsembleStatistics(folds=2).load_state_dict(state)


def test_what_is_no_statistics_is_refused():
    statistics = EnsembleStatistics()
    with pytest.raises(StatisticsError, match="merged, got str"):
        statistics.merge("others")
    with pytest.raises(StatisticsError, match="mapping"):
        statistics.load_state_dict(5)
