"""H as a function of α: folds left out, and the same from features, moments and projections."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
from problems import data, statistics_of

from hgprompt.errors import PromptError
from hgprompt.mixture import FeatureMixture, MomentMixture, _solve_beside_few_null
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
    for k, (value, gradient) in enumerate(score.without_folds([WEIGHTS.numpy()])[0]):
        expected = HScore(statistics, shrinkage=0.1, without_fold=k)(WEIGHTS.numpy())
        assert value == pytest.approx(expected[0], rel=1e-9)
        # Steps of 1e-5: the differences are off by their square, and by float64's rounding of H over the step.
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


def _after_a_layer_norm(count=90, width=24, classes=4):
    """Features [2, N, h] in float32 that lie in one hyperplane but for rounding, and labels."""
    g = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    z = torch.randn(2, count, width, generator=g) + torch.randn(2, classes, width, generator=g)[:, labels]
    weight, bias = 1 + 0.3 * torch.rand(width, generator=g), torch.randn(width, generator=g)
    return torch.nn.functional.layer_norm(z, (width,), weight, bias), labels


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("constant", [0, 1, 12])  # features besides that are the same for every image
def test_equation_5_where_the_covariance_is_singular(keep, constant):
    """However many images there are. The null direction's eigenvalue is rounding, and its inverse would be anything."""
    features, labels = _after_a_layer_norm()
    features = torch.cat([features, torch.full((*features.shape[:2], constant), 0.3)], dim=2)
    score = HScore(statistics_of(features, labels, keep), shrinkage=0.0)
    for weights in ([1.0, 0.0], [0.3, 0.7]):
        mixed = np.tensordot(weights, features.double().numpy(), axes=1)
        value, gradient = score(np.array(weights))
        # The covariance has a condition of about 10 beside its null directions: float64 loses little.
        assert value == pytest.approx(literal.h_score(mixed, labels.numpy()), rel=1e-9)
        ahead, back = ([score(np.array(weights) + sign * step)[0] for step in 1e-5 * np.eye(2)] for sign in (1, -1))
        np.testing.assert_allclose(gradient, np.subtract(ahead, back) / 2e-5, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("null", "plain"), [(0, True), (1, True), (5, True), (8, False), (20, False)])
def test_few_null_directions_are_found_without_the_spectrum(null, plain):
    g = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64)).Q
    values = torch.logspace(-4, 1, 32, dtype=torch.float64)
    values[:null] = 1e-15
    matrix, right = (basis * values) @ basis.T, torch.randn(32, 3, generator=g, dtype=torch.float64)
    found = _solve_beside_few_null(matrix, right, 100)
    assert (found is not None) == plain
    if found is not None:
        inverse = torch.where(values > 1e-12, 1 / values, 0)
        # 1e4 is the largest of the inverse: beside it, float64 keeps ten digits and more.
        torch.testing.assert_close(found, (basis * inverse) @ (basis.T @ right), rtol=1e-9, atol=1e-6)


def test_what_is_neither_null_nor_plainly_not_needs_the_spectrum():
    g = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64)).Q
    values = torch.ones(32, dtype=torch.float64)
    values[0] = 1e-11
    matrix = (basis * values) @ basis.T
    assert _solve_beside_few_null(matrix, torch.ones(32, 1, dtype=torch.float64), 100) is None
