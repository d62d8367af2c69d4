"""Heads in closed form against LDA written out, and the temperature against SciPy."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hgprompt.errors import DataError, OptionError
from hgprompt.sample import folds_of
from hgprompt.statistics import EnsembleStatistics
from hgprompt.task_loss import (
    fit_heads,
    given_loss,
    held_out_logits,
    inverse_temperatures,
    lda_intensity,
    surest_temperatures,
)

M, N, H, C = 3, 60, 5, 4
FOLD_OF = torch.from_numpy(folds_of(np.arange(N), 4))


def _data(seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (N,), generator=g)
    labels[: 4 * C] = torch.arange(4 * C) // 4  # every class in every fold
    features = torch.randn(M, N, H, generator=g, dtype=torch.float64)
    return features + torch.randn(M, C, H, generator=g, dtype=torch.float64)[:, labels], labels


def _statistics(features, labels, keep="features", folds=4):
    statistics = EnsembleStatistics(folds=folds, keep=keep)
    for i in range(0, N, 7):
        statistics.update(features[:, i : i + 7], labels[i : i + 7])
    return statistics


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("kind", ["lda", "shared-lda", "centroid"])
def test_heads_are_cross_fitted_lda(kind, keep):
    features, labels = _data()
    statistics = _statistics(features, labels, keep)
    intensity = 1.0 if kind == "centroid" else lda_intensity(statistics.mixture_moments())
    fold = FOLD_OF
    for k, head in enumerate(fit_heads(kind, statistics, device=torch.device("cpu"))):
        ours = head.logits(features[:, fold == k], slice(None))
        for m in range(M):
            fit = features.mean(0) if kind == "shared-lda" else features[m]
            expected = literal.lda_logits(fit[fold != k], labels[fold != k], features[m, fold == k], intensity)
            torch.testing.assert_close(ours[m], expected, rtol=1e-8, atol=1e-8)
        expected_loss = F.cross_entropy(ours[1], labels[fold == k], reduction="sum")
        torch.testing.assert_close(
            head.loss(features[1:2, fold == k], labels[fold == k], slice(1, 2))[0], expected_loss
        )


def test_temperature_minimises_the_held_out_cross_entropy():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, C, (200,), generator=g)
    logits = torch.randn(2, 200, C, generator=g, dtype=torch.float64)
    logits[:, torch.arange(200), labels] += 1.5
    logits *= torch.tensor([30.0, 0.1])[:, None, None]
    found = inverse_temperatures(logits, labels)
    for m in range(2):
        assert float(found[m]) == pytest.approx(literal.temperature(logits[m], labels), rel=1e-5)
    assert inverse_temperatures(logits, torch.full((200,), -100)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e7])
def test_no_head_is_surer_than_its_images_can_make_it(scale):
    """All right: the cross-entropy alone has no least factor."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(50) % C
    logits = scale * (torch.rand(1, 50, C, generator=g, dtype=torch.float64) + 2 * torch.eye(C)[labels])
    (found,) = surest_temperatures(logits, labels).tolist()
    assert found == pytest.approx(literal.temperature(logits[0], labels), rel=1e-5)
    assert found < inverse_temperatures(logits, labels)
    # Laplace: 50 of 50 right makes it 51/52 that the next is.
    assert float((found * logits[0]).softmax(1).amax(1).mean()) == pytest.approx(51 / 52)


def test_class_that_a_fold_has_not_seen_counts_nothing():
    features, labels = _data()
    fold = FOLD_OF
    i = int((fold == 1).nonzero()[-1])
    labels[i] = 77  # fold 1 alone has this class
    statistics = _statistics(features, labels)
    heads = fit_heads("lda", statistics, device=torch.device("cpu"))
    assert heads[1].classes.tolist() == [0, 1, 2, 3]
    assert heads[0].classes.tolist() == [0, 1, 2, 3, 77]
    loss = heads[1].loss(features[:, i : i + 1], labels[i : i + 1], slice(None))
    assert loss.tolist() == [0.0] * M
    parts = [(features[:, fold == k], labels[fold == k]) for k in range(4)]
    logits, targets = held_out_logits(heads, [f for f, _ in parts], [y for _, y in parts])
    assert logits.shape == (M, N, 5)
    assert int((targets < 0).sum()) == 1
    assert inverse_temperatures(logits, targets).isfinite().all()


def test_labels_in_turn_are_all_scored():
    """As a loader of class-sorted, evenly drawn images deals them: as many classes as folds, or a multiple."""
    labels = torch.arange(160) % 8
    features = torch.randn(1, 160, H, generator=torch.Generator().manual_seed(0))
    statistics = EnsembleStatistics(folds=8, keep="features")
    statistics.update(features, labels)
    parts = [(features[:, statistics.fold_of == k], labels[statistics.fold_of == k]) for k in range(8)]
    heads = fit_heads("lda", statistics, device=torch.device("cpu"))
    targets = held_out_logits(heads, [f for f, _ in parts], [y for _, y in parts])[1]
    assert (targets >= 0).all()


def test_own_heads():
    features, labels = _data()
    head = torch.nn.Linear(H, C).double()
    loss = given_loss(head, M)(features[1:], labels, slice(1, 3))
    torch.testing.assert_close(loss[1], F.cross_entropy(head(features[2]), labels, reduction="sum"))
    with pytest.raises(OptionError, match="one per prompt"):
        given_loss([head], M)
    with pytest.raises(OptionError, match="one per prompt"):
        given_loss(3, M)
    with pytest.raises(DataError, match="logits"):
        given_loss(lambda f: f[:, :2], M)(features, labels, slice(0, M))
