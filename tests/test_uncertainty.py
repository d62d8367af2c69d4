"""Standard errors against resampling, finite differences and fresh samples."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
from problems import data, statistics_of
from scipy import stats

from hgprompt.mixture import FeatureMixture
from hgprompt.objective import HScore
from hgprompt.optimize import WeightProblem, jackknife_std
from hgprompt.statistics import EnsembleStatistics
from hgprompt.uncertainty import rank_std, weight_error

WEIGHTS = np.array([0.2, 0.5, 0.3])


def _weighted_h_score(f: np.ndarray, labels: np.ndarray, share: np.ndarray, intensity: float) -> float:
    """Eq. 5, shrunk, with a share for every image instead of 1/N."""
    f = f - share @ f
    sigma = (f * share[:, None]).T @ f
    between = np.zeros_like(sigma)
    for c in np.unique(labels):
        mass = share[labels == c].sum()
        mean = share[labels == c] @ f[labels == c] / mass
        between += mass * np.outer(mean, mean)
    h = len(sigma)
    shrunk = (1 - intensity) * sigma + intensity * np.trace(sigma) / h * np.eye(h)
    return (1 - intensity) * float(np.trace(np.linalg.solve(shrunk, between)))


@pytest.mark.parametrize("shape", [(40, 3, 6, 4), (12, 3, 30, 3)], ids=str)
def test_influence_is_the_derivative_in_the_share_of_an_image(shape):
    features, labels = data(*shape)
    n, a = shape[0], 0.1
    mixture = FeatureMixture(features, labels)
    weights = torch.from_numpy(WEIGHTS)
    influence = mixture.influence(weights, a, mixture.discriminants(weights, a)[1])
    mixed = np.tensordot(WEIGHTS, features.numpy(), axes=1)
    for image in (0, 5, n - 1):
        values = []
        for step in (1e-5, -1e-5):
            share = np.full(n, (1 - step) / n)
            share[image] += step
            values.append(_weighted_h_score(mixed, labels.numpy(), share, a))
        assert float(influence[image]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)
    assert _weighted_h_score(mixed, labels.numpy(), np.full(n, 1 / n), a) == pytest.approx(
        literal.h_score(mixed, labels.numpy(), a)
    )
    assert float(influence.mean()) == pytest.approx(0, abs=1e-10)  # H does not depend on the number of images


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_errors_of_h_match_the_spread_of_fresh_samples(keep):
    values, errors, source_values, source_errors = [], [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(rng.integers(0, 3, 200))
        means = np.random.default_rng(99).standard_normal((3, 3, 5))
        features = torch.from_numpy(rng.standard_normal((3, 200, 5)) + 0.6 * means[:, labels])
        problem = WeightProblem(statistics_of(features, labels, keep, folds=8), shrinkage=0.1, starts=1)
        values.append(HScore(problem.statistics, shrinkage=0.1)(WEIGHTS)[0])
        errors.append(problem.h_score_std(torch.from_numpy(WEIGHTS)))
        source_values.append(problem.source_h_scores)
        source_errors.append(problem.source_covariance)
    # 40 samples know a standard deviation to 11 %, and 8 folds one to 27 %, here averaged over 40.
    assert np.median(errors) == pytest.approx(np.std(values), rel=0.35)
    expected = torch.stack(source_values).std(0)
    found = torch.stack(source_errors).diagonal(dim1=1, dim2=2).sqrt().median(0).values
    torch.testing.assert_close(found, expected, rtol=0.4, atol=0)


def test_errors_without_folds_are_nan_where_only_moments_are_kept():
    problem = WeightProblem(statistics_of(*data(40, 3, 6, 4), "moments"))
    assert problem.source_covariance.isnan().all()
    assert np.isnan(problem.h_score_std(torch.from_numpy(WEIGHTS)))
    assert rank_std(problem.source_h_scores, problem.source_covariance).isnan().all()


def test_ranks_that_are_certain_and_ranks_that_are_not():
    scores = torch.tensor([3.0, 1.0, 1.0, -5.0], dtype=torch.float64)
    std = rank_std(scores, torch.diag(torch.tensor([0.01, 0.1, 0.1, 0.01], dtype=torch.float64)) ** 2)
    assert std[0] == std[3] == 0
    # Two equals change places half of the time: ranks 1 and 2 with standard deviation ½; 4,000 draws know it to 1 %.
    torch.testing.assert_close(std[1:3], torch.full((2,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    together = torch.full((4, 4), 25.0, dtype=torch.float64)  # errors that all share do not change the order
    assert rank_std(torch.arange(4).double(), together).max() == 0


def test_the_bound_holds_as_often_as_it_says():
    """Jackknife replicates of a mean of normal vectors, whose error is known."""
    rng = np.random.default_rng(0)
    kept = 0
    for _ in range(400):
        parts = rng.standard_normal((8, 5)) * [0.1, 0.2, 0.05, 0.1, 0.3]
        mean = parts.mean(0)
        without = torch.from_numpy((parts.sum(0) - parts) / 7)
        kept += np.abs(mean).sum() <= weight_error(without, confidence=0.9)
    assert 0.86 <= kept / 400 <= 0.96  # 400 draws know a share of 0.9 to ±0.03 (two standard errors)


def test_the_bound_of_one_fold_is_unknown():
    assert np.isnan(weight_error(torch.ones(1, 3, dtype=torch.float64)))
    assert np.isnan(weight_error(torch.full((8, 3), torch.nan, dtype=torch.float64)))
    assert weight_error(torch.full((8, 3), 1 / 3, dtype=torch.float64)) == pytest.approx(0, abs=1e-12)


def test_a_rank_that_is_certain_beside_two_that_are_a_coin_toss():
    scores = torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64)
    found = rank_std(scores, torch.diag(torch.tensor([1e-6, 0.1, 0.1], dtype=torch.float64)))
    assert found.tolist() == pytest.approx([0, 0.5, 0.5], abs=0.01)  # 4,000 tosses


@pytest.mark.parametrize("folds", [2, 4, 16])
def test_the_bound_is_students_quantile(folds):
    """Of two weights with α_1 = 1 - α_0, ‖α - α_∞‖₁ is twice the first one's error: its 90 % quantile is known."""
    first = torch.from_numpy(0.5 + 0.05 * np.random.default_rng(folds).standard_normal(folds))
    without_fold = torch.stack([first, 1 - first], dim=1)
    expected = 2 * float(jackknife_std(without_fold)[0]) * stats.t.ppf(0.95, folds - 1)
    assert weight_error(without_fold) == pytest.approx(expected, rel=0.12)  # quantiles of 4,000 draws


@pytest.mark.parametrize(("images", "known"), [(7, False), (24, True)])
def test_folds_without_images_leave_the_error_of_moments_unknown(images, known):
    statistics = EnsembleStatistics(keep="moments", folds=8)
    statistics.update(data(images, 2, 4, 2)[0], torch.arange(images) % 2)
    problem = WeightProblem(statistics, shrinkage=0.3)
    assert np.isfinite(problem.h_score_std(torch.tensor([0.5, 0.5], dtype=torch.float64))) == known
    assert bool(problem.source_covariance.isfinite().all()) == known
