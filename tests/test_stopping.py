"""The stop rule: when it looks, what it needs to be sure, and streams that it does not trust."""

from __future__ import annotations

import itertools

import literal
import numpy as np
import pytest
import torch

import hgprompt.one_pass
from hgprompt import HGPromptWarning, OptionError, fast_ensemble
from hgprompt.stopping import FIRST, GROWTH, StopRule, looks_shuffled


def _sure(*weights: float) -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.tensor(weights, dtype=torch.float64)
    return w, w.expand(8, -1)


def test_looks_come_after_growing_numbers_of_images():
    rule = StopRule(0.1, folds=8)
    labels = torch.arange(5000) % 3
    looks = [n for n in range(10, 5001, 10) if rule.due(labels[n - 10 : n])]
    assert looks[0] >= FIRST
    assert all(GROWTH * a <= b <= GROWTH * a + 10 for a, b in itertools.pairwise(looks))


def test_a_look_that_knows_nothing_counts_as_infinite():
    """One fold held all of a class: without it there is no α. A NaN would be lost among later looks."""
    rule = StopRule(0.1, folds=8)
    for images in (100, 100, 200):
        _look(rule, images, 0.5, 0.5)
    rule.due(torch.arange(400) % 3)
    weights, without = _sure(0.5, 0.5)
    without = without.clone()
    without[3] = torch.nan
    assert not rule.look(weights, without)
    assert rule.error == float("inf")
    assert rule.state()[2].isnan().sum() == 0


def _look(rule, images, *weights):
    rule.due(torch.arange(images) % 3)
    return rule.look(*_sure(*weights))


def test_it_takes_three_looks_that_agree_over_twice_as_many_images():
    rule = StopRule(0.1, folds=8)
    assert not _look(rule, 100, 0.5, 0.5)
    assert rule.error == float("inf")
    assert not _look(rule, 99, 0.5, 0.5)  # 199: nothing to compare with, at half of them
    assert not _look(rule, 1, 0.5, 0.5)
    assert not _look(rule, 200, 0.5, 0.5)  # the look at 199 is still among the last three
    assert _look(rule, 400, 0.5, 0.5)
    assert rule.error == 0


def test_the_bound_is_twice_the_largest_of_the_last_three():
    rule = StopRule(0.1, folds=8)
    moves = (0.5, 0.7, 0.72, 0.73, 0.735)  # L1 distances 0.4, 0.04, 0.02, 0.01
    stops = [_look(rule, rule.num_images or 100, w, 1 - w) for w in moves]
    assert stops == [False, False, False, False, True]
    assert rule.error == pytest.approx(2 * 0.04)


def test_another_look_at_the_same_images_takes_the_place_of_the_first():
    rule = StopRule(0.1, folds=8)
    for images in (100, 100, 200, 400):
        _look(rule, images, 0.5, 0.5)
    assert rule.error == 0
    assert not _look(rule, 0, 0.9, 0.1)
    assert rule.error == pytest.approx(2 * 0.8)
    assert _look(rule, 0, 0.5, 0.5)


def test_folds_that_disagree_are_not_known():
    rule = StopRule(0.1, folds=2)
    for images in (100, 100, 200):
        _look(rule, images, 0.5, 0.5)
    rule.due(torch.arange(400) % 3)
    w = torch.tensor([[0.4, 0.6], [0.6, 0.4]], dtype=torch.float64)
    assert not rule.look(w.mean(0), w)
    assert 0.2 < rule.error < 8


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_shuffled_streams_are_trusted(classes):
    rng = np.random.default_rng(0)
    failed = sum(not looks_shuffled(torch.from_numpy(rng.integers(0, classes, 400))) for _ in range(500))
    assert failed <= 3  # 0.05 are to be expected; the test is approximate where a class has few images


@pytest.mark.parametrize("n", [100, 1001])
def test_sorted_streams_are_not(n):
    labels = torch.arange(n) * 5 // n
    assert not looks_shuffled(labels)
    assert not looks_shuffled(torch.zeros(n, dtype=torch.int64).index_fill(0, torch.arange(n // 2, n), 1))
    assert looks_shuffled(labels[torch.randperm(n, generator=torch.Generator().manual_seed(0))])


def test_streams_of_one_class_or_none():
    assert looks_shuffled(torch.zeros(10, dtype=torch.int64))
    assert not looks_shuffled(torch.zeros(0, dtype=torch.int64))


def _endless(seed: int, limit: int, *, by_class: bool = False):
    """Batches of images in which class shows plainly; counts how many were asked for."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (limit,), generator=generator)
    if by_class:
        labels = labels.sort().values
    for start in range(0, limit, 16):
        y = labels[start : start + 16]
        images = torch.randn(len(y), 3, 16, 16, generator=generator)
        images[:, 0] += 2.0 * y[:, None, None]
        yield images.double(), y


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_stream_is_read_until_alpha_is_known(lam):
    model = literal.tiny_vit().double()
    prompts = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    stream = _endless(0, 4000)
    result = fast_ensemble(prompts, stream, backbone=model, lam=lam, tolerance=1.0, gradient_images=64)
    assert result.stop_reason == "tolerance reached"
    assert result.n_images < 4000
    assert result.weight_error <= 1
    assert len(list(stream)) == (4000 - result.n_images) // 16  # not one batch more was read
    again = fast_ensemble(
        prompts, list(_endless(0, 4000))[: result.n_images // 16], backbone=model, lam=lam, gradient_images=64
    )
    assert again.stop_reason == "end of data"
    torch.testing.assert_close(again.weights, result.weights)


class _WithWorkers:
    """An iterator with workers to end, as a DataLoader's is."""

    def __init__(self, batches, events):
        self.batches, self.events = batches, events

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)

    def _shutdown_workers(self):
        self.events.append("workers ended")


class _Loader:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __iter__(self):
        return _WithWorkers(*self.arguments)


def test_the_loaders_workers_end_where_the_stream_stops(monkeypatch):
    events, gap = [], hgprompt.one_pass.Pass.mixing_gap

    def noted(*arguments):
        events.append("the mixed prompt")
        return gap(*arguments)

    monkeypatch.setattr(hgprompt.one_pass.Pass, "mixing_gap", noted)
    prompts = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loader, options = _Loader(_endless(0, 4000), events), {"lam": 0.0, "tolerance": 1.0, "gradient_images": 64}
    result = fast_ensemble(prompts, loader, backbone=literal.tiny_vit().double(), **options)
    assert result.stop_reason == "tolerance reached"
    assert events == ["workers ended", "the mixed prompt"]


def test_a_tolerance_out_of_reach_reads_everything():
    model = literal.tiny_vit().double()
    prompts = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with_rule = fast_ensemble(prompts, _endless(0, 320), backbone=model, lam=0.0, tolerance=1e-9)
    without = fast_ensemble(prompts, _endless(0, 320), backbone=model, lam=0.0)
    assert with_rule.stop_reason == "end of data"
    # Features became moments at the same image, but in batches of other lengths: other last bits.
    torch.testing.assert_close(with_rule.weights, without.weights, rtol=1e-6, atol=1e-6)


def test_a_sorted_stream_is_read_to_its_end():
    model = literal.tiny_vit().double()
    prompts = torch.randn(3, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.warns(HGPromptWarning, match="shuffle"):
        result = fast_ensemble(prompts, _endless(0, 320, by_class=True), backbone=model, lam=0.0, tolerance=2.0)
    assert result.n_images == 320


@pytest.mark.parametrize(
    "options",
    [{"tolerance": 0.0}, {"tolerance": -1}, {"tolerance": float("inf")}, {"tolerance": 0.1, "folds": 1}],
    ids=str,
)
def test_bad_tolerances(options):
    with pytest.raises(OptionError):
        fast_ensemble(torch.randn(2, 2, 16), [], backbone=literal.tiny_vit(), **options)
