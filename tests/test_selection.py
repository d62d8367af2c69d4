"""Selection from pools: against all subsets where they can be counted, and what halving spends."""

from __future__ import annotations

import itertools

import literal
import numpy as np
import pytest
import torch
from problems import data, statistics_of
from torch.utils.data import DataLoader

from hgprompt import DataError, HGPromptWarning, OptionError, StatisticsError, select_prompts
from hgprompt.inputs import images_in
from hgprompt.objective import HScore
from hgprompt.optimize import optimize_weights
from hgprompt.selection import (
    SuccessiveHalving,
    _promising,
    greedy_selection,
    mixture_of,
    ranking_by_h_score,
    regret_of,
)


def test_selected_statistics_are_those_of_the_prompts_alone():
    features, labels = data(40, 5, 6, 3)
    part = statistics_of(features, labels, folds=4).select([3, 0])
    alone = statistics_of(features[[3, 0]], labels, folds=4)
    weights = np.array([0.3, 0.7])
    assert HScore(part)(weights)[0] == HScore(alone)(weights)[0]
    assert torch.equal(part.fold_of, alone.fold_of)
    assert part.classes == alone.classes
    with pytest.raises(StatisticsError, match="moments"):
        statistics_of(features, labels, "moments").select([0])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_beside_the_best_of_all_pairs(seed):
    statistics = statistics_of(*data(120, 8, 10, 4, seed=seed, signal=0.4))
    intensity = HScore(statistics).intensity
    found = greedy_selection(statistics, 2)

    def objective(pair):
        return optimize_weights(statistics.select(list(pair)), lam=0.0, shrinkage=intensity).diagnostics.objective

    values = sorted(objective(pair) for pair in itertools.combinations(range(8), 2))
    # Greedy selection has no guarantee of the best pair of 28; it must be among the first few.
    assert objective(found.order[:2].tolist()) <= values[3] + 1e-9
    assert sorted(found.order.tolist()) == list(range(8))
    assert found.weights.shape == (2,)
    assert float(found.weights.sum()) == pytest.approx(1)


def test_twins_are_not_both_taken():
    features, labels = data(200, 2, 6, 4, seed=1, signal=0.8)
    noise = torch.randn(4, *features.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twins = torch.cat([features[:1], features[:1] + 1e-3 * noise[:1], features[1:], noise[1:]])
    by_rank = ranking_by_h_score(statistics_of(twins, labels), 2)
    greedy = greedy_selection(statistics_of(twins, labels), 2)
    assert {0, 1} != set(greedy.order[:2].tolist())
    assert greedy.objective <= by_rank.objective + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_never_worse_than_ranking(seed):
    statistics = statistics_of(*_pool(seed))
    ranked, found = ranking_by_h_score(statistics, 4), greedy_selection(statistics, 4)
    # The ranking's set is one of those tried, solved from the same starts; 1e-4 is the gap at which both stop.
    assert found.objective <= ranked.objective + 1e-4


def test_ranking_is_by_h_alone():
    statistics = statistics_of(*data(60, 5, 6, 3))
    found = ranking_by_h_score(statistics, 3)
    alone = [HScore(statistics)(vertex)[0] for vertex in np.eye(5)]
    assert found.order.tolist() == np.argsort(alone)[::-1].tolist()
    again = mixture_of(statistics, found.order[:3].tolist(), intensity=found.intensity)
    torch.testing.assert_close(found.weights, again.weights)


def _pool(seed=0, count=32, good=4):
    """Good prompts see the classes, the others next to nothing. What images have beside their class is mostly the same
    under every prompt, as it is under real ones: else mixing in any prompt would average it away."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (400,), generator=g)
    strength = torch.full((count,), 0.05)
    strength[:good] = 1.0
    means = torch.randn(count, 4, 8, generator=g) * strength[:, None, None]
    noise = torch.randn(400, 8, generator=g) + 0.2 * torch.randn(count, 400, 8, generator=g)
    return noise + means[:, labels], labels


@pytest.mark.parametrize("seed", range(3))
def test_halving_spends_what_it_says_and_finds_the_good(seed):
    features, labels = _pool(seed)
    # One intensity for all: estimated, it is that of the finalists here and of the whole pool there.
    halving = _halve(features, labels, shrinkage=0.1)
    found = halving.finish()
    # The default budget (1 + r/2)/2^r with r = 3 is 10 of 32 prompts, half of them to the end; R = 3 eliminations to
    # 17, 9 and 5, the first at a share of (10 - 5)/(15 + 2 · 8 + 4 · 4) = 5/47 of the 400 images, in batches of 10.
    assert halving.rounds == [(0, 32), (40, 17), (80, 9), (170, 5)]
    assert halving.pairs == 32 * 40 + 17 * 40 + 9 * 90 + 5 * 230 <= 10 * 400
    assert len({0, 1, 2, 3} & set(found.order[:4].tolist())) >= 3  # a weak one may lose its place to what dampens noise
    everything = statistics_of(features, labels)
    best = greedy_selection(everything, 4, shrinkage=0.1)
    assert regret_of(everything, found.order[:4].tolist(), best, warm=[found.weights]) < 0.01


@pytest.mark.parametrize(("count", "size", "budget"), [(256, 13, 0.25), (256, 13, 0.2), (100, 7, 0.4), (32, 4, 0.5)])
@pytest.mark.parametrize("batch", [1, 20, 48])
def test_a_budget_is_kept_and_used(count, size, budget, batch, monkeypatch):
    monkeypatch.setattr(SuccessiveHalving, "_eliminate", _first_go_on)
    halving = SuccessiveHalving(count, size, 1000, budget=budget)
    for start in range(0, 1000, batch):
        labels = torch.zeros(min(batch, 1000 - start), dtype=torch.int64)
        halving.update(torch.zeros(len(halving.survivors), len(labels), 1), labels)
    assert halving.pairs <= budget * count * 1000 + 1e-6
    # Every elimination comes less than a batch too early (and it is of whole images).
    early = sum(a - b for (_, a), (_, b) in itertools.pairwise(halving.rounds)) * batch
    assert halving.pairs > budget * count * 1000 - early - 1e-6
    assert halving.rounds[-1][1] >= size


def _first_go_on(halving, left):
    halving.survivors = halving.survivors[:left]
    halving.statistics = halving.statistics.select(range(left))
    halving.rounds.append((halving.statistics.num_images, left))


def test_the_default_budget_is_a_quarter_of_a_large_pool(monkeypatch):
    monkeypatch.setattr(SuccessiveHalving, "_eliminate", _first_go_on)
    halving = SuccessiveHalving(64, 4, 960)
    for label in range(960):
        halving.update(torch.zeros(len(halving.survivors), 1, 1), torch.tensor([label % 2]))
    # 8 of the 16 prompts that a quarter pays for go to the end: R = 3, and 8 + t (32 + 2 · 16 + 4 · 8) = 16, hence the
    # first elimination after a twelfth of the 960 images.
    assert halving.rounds == [(0, 64), (80, 32), (160, 16), (320, 8)]
    assert halving.pairs == 64 * 960 / 4


def test_either_of_two_measures_lets_a_prompt_go_on():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    noise = torch.randn(8, 400, 6, generator=g, dtype=torch.float64)
    noise[..., 0] *= 0.05
    sign = 2.0 * labels - 1
    noise[2, :, 0] += 0.05 * sign  # most of the classes by H, in the one direction of little variance
    noise[5, :, 1:] += 0.3 * sign[:, None]  # most of tr Σ_between / tr Σ
    order = _promising(statistics_of(noise, labels), 1e-4)  # a stronger one would drown the faint direction
    # H of prompt 2 is near 1/2, and of 5 near 5 · 0.09/(1 + 5 · 0.09) = 0.3; their shares of the variance are near
    # 0.0025/5 and 0.09/1.09. Noise alone has 6/400 of either.
    assert set(order[:2]) == {2, 5}
    assert sorted(order) == list(range(8))


def test_survivors_have_seen_every_image():
    features, labels = _pool()
    halving = SuccessiveHalving(32, 4, 400)
    for start in range(0, 400, 25):
        batch = slice(start, start + 25)
        halving.update(features[halving.survivors, batch], labels[batch])
    kept, kept_labels = halving.statistics.features_and_labels()
    assert torch.equal(kept, features[halving.survivors])
    assert torch.equal(kept_labels, labels)


def test_a_stream_too_short_to_judge_by_eliminates_nothing():
    halving = SuccessiveHalving(32, 4, 20)
    halving.update(torch.randn(32, 20, 6), torch.arange(20) % 3)
    assert len(halving.survivors) == 32


def test_a_stream_shorter_than_announced_is_said_to_be():
    features, labels = _pool(0)
    halving = SuccessiveHalving(32, 4, 4000)  # ten times what comes: its second elimination would be at 800 images
    for start in range(0, 400, 10):
        batch = slice(start, start + 10)
        halving.update(features[halving.survivors][:, batch], labels[batch])
    with pytest.warns(HGPromptWarning, match="ended after 400 images, where num_images says 4000: . elimination"):
        halving.finish()


def test_a_sorted_stream_is_said_to_be_no_fair_sample():
    features, labels = _pool()
    by_class = labels.argsort()
    first = torch.cat([torch.nonzero(labels == c).flatten()[:25] for c in (0, 1)])
    sorted_at_first = torch.cat([first, torch.tensor(sorted(set(range(400)) - set(first.tolist())))])
    with pytest.warns(HGPromptWarning, match="shuffle"):
        _halve(features[:, sorted_at_first], labels[sorted_at_first])
    with pytest.raises(DataError, match="shuffle"):
        _halve(features[:, by_class], labels[by_class])


def _halve(features, labels, **options):
    halving = SuccessiveHalving(32, 4, 400, **options)
    for start in range(0, 400, 10):
        batch = slice(start, start + 10)
        halving.update(features[halving.survivors, batch], labels[batch])
    return halving


def test_a_prompt_that_fails_late_is_named_by_its_number_in_the_pool():
    features, labels = _pool()
    halving = SuccessiveHalving(32, 4, 400)
    for start in range(0, 200, 10):
        halving.update(features[halving.survivors, start : start + 10], labels[start : start + 10])
    assert len(halving.survivors) < 32
    bad = features[halving.survivors, 200:210].clone()
    bad[-1] = torch.nan
    with pytest.raises(DataError, match=rf"features of prompt {int(halving.survivors[-1])} are not finite"):
        halving.update(bad, labels[200:210])


def _task():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (160,), generator=generator)
    images = torch.randn(160, 3, 16, 16, generator=generator, dtype=torch.float64)
    images[:, 0] += labels[:, None, None]
    return [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 160, 8)]


@pytest.mark.parametrize("method", ["halving", "greedy", "ranking"])
def test_select_prompts_end_to_end(method):
    prompts = torch.randn(12, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    named = {f"prompt {i}": p for i, p in enumerate(prompts)}
    found = select_prompts(
        named, _task(), size=3, backbone=literal.tiny_vit().double(), method=method, full_evaluation=True
    )
    assert found.names == found.pool.names == tuple(f"prompt {i}" for i in found.indices)
    assert torch.equal(found.pool.stack(), prompts[list(found.indices)])
    assert found.share == found.pairs / (12 * 160)
    assert (found.share < 1) == (method == "halving")
    assert np.isfinite(found.regret)
    plain = select_prompts(named, _task(), size=3, backbone=literal.tiny_vit().double(), method=method)
    assert plain.indices == found.indices
    assert np.isnan(plain.regret)


def test_a_first_batch_that_has_shrunk_says_nothing_of_the_others():
    """Of batches of 8, the first has lost 6 images: planned by 20 batches of 2, every elimination would be dropped."""
    items = [(i, y) for images, labels in _task() for i, y in zip(images, labels, strict=True)]

    def collate(batch):
        kept = [one for one in batch if one[0] is not None]
        return torch.stack([i for i, _ in kept]), torch.stack([y for _, y in kept])

    prompts = torch.randn(64, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"size": 3, "backbone": literal.tiny_vit().double()}
    shrunk = [(None if n < 6 else i, y) for n, (i, y) in enumerate(items)]
    found = select_prompts(prompts, DataLoader(shrunk, 8, collate_fn=collate), **options)
    planned = select_prompts(prompts, DataLoader(shrunk, 8, collate_fn=collate), num_images=160, **options)
    assert found.rounds == planned.rounds
    assert len(found.rounds) > 1
    assert images_in(DataLoader(items[:5], 8), 1, 5) == 5  # one batch is all there is
    assert images_in([None] * 3, 3, 8) == 24


def test_bad_options():
    model, prompts = literal.tiny_vit(), torch.randn(4, 2, 16)
    for options in (
        {"size": 0},
        {"size": 5},
        {"size": 2, "device": "gpu"},
        {"size": 2, "method": "magic"},
        {"size": 2, "budget": 0.2},
        {"size": 2, "micro_batch": 0},
    ):
        with pytest.raises(OptionError):
            select_prompts(prompts, [(torch.zeros(2, 3, 16, 16), torch.arange(2))], backbone=model, **options)
    with pytest.raises(OptionError, match="num_images"):
        select_prompts(prompts, iter([(torch.zeros(2, 3, 16, 16), torch.arange(2))]), size=2, backbone=model)
