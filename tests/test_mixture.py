"""H as a function of α: folds left out, and the same from features, moments and projections."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import data, statistics_of

from hgprompt.errors import PromptError
from hgprompt.mixture import FeatureMixture, MomentMixture
from hgprompt.objective import HScore
from hgprompt.projection import FeatureProjection, MomentProjection

WEIGHTS = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
FOLDS = 3


@pytest.mark.parametrize("shape", [(60, 4, 7, 3), (20, 4, 30, 5)], ids=str)
@pytest.mark.parametrize("intensity", [0.02, 0.6])
def test_folds_left_out_equal_the_other_images_alone(shape, intensity):
    features, labels = data(*shape)
    labels[labels == 0] = 1
    labels[2] = 0  # a class that is gone with fold 2
    fold_of = torch.arange(shape[0]) % FOLDS
    values, gradients = FeatureMixture(features, labels).without_folds(fold_of, FOLDS, WEIGHTS, intensity)
    for k in range(FOLDS):
        alone = FeatureMixture(features[:, fold_of != k], labels[fold_of != k])
        value, gradient = alone.value_and_gradient(WEIGHTS, intensity)
        assert float(values[k]) == pytest.approx(value, rel=1e-9)  # the same sums in another order, float64
        torch.testing.assert_close(gradients[k], gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_folds_left_out_of_a_score(keep):
    features, labels = data(60, 4, 7, 3)
    statistics = statistics_of(features, labels, keep, folds=FOLDS)
    score = HScore(statistics, shrinkage=0.1)
    for k, (value, gradient) in enumerate(score.without_folds(WEIGHTS.numpy())):
        expected = HScore(statistics, shrinkage=0.1, without_fold=k)(WEIGHTS.numpy())
        assert value == pytest.approx(expected[0], rel=1e-9)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 4, 7, 3), (20, 4, 30, 5)], ids=str)
def test_traces_are_those_of_the_covariances(shape):
    features, labels = data(*shape)
    f = (features - features.mean(1, keepdim=True)).numpy()
    expected = np.einsum("inh,jnh->ij", f, f) / shape[0]
    statistics = statistics_of(features, labels, "moments")
    for mixture in (FeatureMixture(features, labels), MomentMixture(statistics.moments(), features.dtype)):
        np.testing.assert_allclose(mixture.traces, expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(60, 4, 7, 3), (20, 4, 30, 5)], ids=str)
def test_in_a_complete_basis_a_projection_is_the_whole(shape):
    features, labels = data(*shape)
    h = shape[2]
    whole = FeatureMixture(features, labels)
    basis = torch.linalg.qr(torch.randn(h, h, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    growing = FeatureProjection(whole)
    growing.onto(basis[:, :2], 0)
    growing.onto(basis[:, :5], 2)
    moments = MomentProjection(MomentMixture(statistics_of(features, labels, "moments").moments(), features.dtype))
    value, gradient = whole.value_and_gradient(WEIGHTS, 0.1)
    for projection in (growing.onto(basis, 5), moments.onto(basis, 0)):
        ours, slope = projection.value_and_gradient(WEIGHTS, 0.1)
        assert ours == pytest.approx(value, rel=1e-9)
        torch.testing.assert_close(slope, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_weights_does_not_matter(keep, scale):
    """H(cα) = H(α), and its gradient is 1/c times that at α; whether a mixture is constant knows no scale either."""
    features, labels = data(60, 3, 8, 3)
    score = HScore(statistics_of(features.float(), labels, keep))
    weights = np.array([0.5, 0.3, 0.2])
    (value, gradient), (scaled, slope) = score(weights), score(scale * weights)
    assert scaled == pytest.approx(value, rel=1e-9)
    np.testing.assert_allclose(slope * scale, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_features_that_differ_by_their_last_bit_are_constant(keep):
    features, labels = data(60, 2, 8, 3)
    last_bit = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (60, 8)))
    features[1] = 1000 * (1 + last_bit * torch.finfo(torch.float32).eps)
    with pytest.raises(PromptError, match=r"prompts \[1\] give the same feature"):
        HScore(statistics_of(features.float(), labels, keep))
