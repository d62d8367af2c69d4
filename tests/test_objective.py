"""H-score and alignment against the paper's formulas, and what the mathematics says of them."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import data, statistics_of
from scipy.optimize import check_grad

from hgprompt.errors import DataError, OptionError, PromptError
from hgprompt.objective import Alignment, HScore, alignment_loss, gram_of, h_score

SHAPES = [(50, 3, 6, 4), (12, 4, 30, 3), (7, 2, 6, 2), (300, 5, 10, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("intensity", [0.0, 1e-6, 0.05, 0.7])
def test_h_score_is_equation_5(shape, intensity):
    features, labels = data(*shape)
    expected = literal.h_score(features[0].numpy(), labels.numpy(), intensity)
    assert float(h_score(features[0], labels, shrinkage=intensity)) == pytest.approx(expected, rel=1e-7)
    for keep in ("features", "moments"):
        value, _ = HScore(statistics_of(features, labels, keep), shrinkage=intensity)(np.eye(shape[1])[0])
        assert value == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("intensity", [1e-6, 0.05, 0.7])
def test_gradient_of_h_against_finite_differences(shape, intensity, keep):
    score = HScore(statistics_of(*data(*shape), keep=keep), shrinkage=intensity)
    for weights in np.random.default_rng(0).dirichlet(np.ones(shape[1]), size=3):
        # Central differences of a smooth function: error about the square of SciPy's step, 1e-8 relative at best.
        error = check_grad(lambda a: score(a)[0], lambda a: score(a)[1], weights, epsilon=1e-7)
        assert error < 1e-4 * max(1.0, np.abs(score(weights)[1]).max())
        assert abs(score(weights)[1] @ weights) < 1e-9 * max(1.0, score(weights)[0])  # scale of α has no effect


def test_gradient_of_the_literal_score():
    score = HScore(statistics_of(*data(60, 3, 6, 4)), shrinkage=0.0)
    weights = np.array([0.2, 0.5, 0.3])
    assert check_grad(lambda a: score(a)[0], lambda a: score(a)[1], weights, epsilon=1e-7) < 1e-4


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_literal_score_saturates(keep):
    score = HScore(statistics_of(*data(20, 3, 19, 4), keep=keep), shrinkage=0.0)  # N - 1 = h
    for weights in np.random.default_rng(0).dirichlet(np.ones(3), size=4):
        value, gradient = score(weights)
        assert value == pytest.approx(3, abs=1e-6)
        assert np.abs(gradient).max() < 1e-5


def test_pure_noise():
    rng = np.random.default_rng(0)
    n, h, c = 400, 40, 5
    values = [
        float(
            h_score(
                torch.from_numpy(rng.standard_normal((n, h))),
                torch.from_numpy(rng.integers(0, c, n)),
                shrinkage=0.0,
            )
        )
        for _ in range(30)
    ]
    expected = (c - 1) * h / (n - 1)
    assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / np.sqrt(30))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(8, 80), st.integers(2, 20), st.floats(0, 0.99))
def test_bounds_and_invariances(seed, c, n, h, intensity):
    features, labels = data(max(n, c + 1), 1, h, c, seed=seed)
    value = float(h_score(features[0], labels, shrinkage=intensity))
    assert -1e-9 <= value <= c - 1 + 1e-6
    rotation = torch.linalg.qr(
        torch.randn(h, h, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 997))
    )[0]
    moved = 3.5 * features[0] @ rotation + 2
    assert float(h_score(moved, labels, shrinkage=intensity)) == pytest.approx(value, rel=1e-6, abs=1e-8)


def test_literal_score_is_invariant_to_invertible_maps():
    features, labels = data(80, 1, 6, 3)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, after = (float(h_score(f, labels, shrinkage=0.0)) for f in (features[0], features[0] @ matrix + 1))
    assert after == pytest.approx(before, rel=1e-7)


def test_ledoit_wolf_and_oas_by_definition():
    features, labels = data(40, 3, 12, 4)
    f = features.mean(0)
    f = (f - f.mean(0)).numpy()
    n, h = f.shape
    s = f.T @ f / n
    mu = np.trace(s) / h
    spread = sum(np.linalg.norm(np.outer(x, x) - s) ** 2 for x in f) / n**2
    ledoit_wolf = spread / np.linalg.norm(s - mu * np.eye(h)) ** 2
    second, first = np.trace(s @ s), np.trace(s) ** 2
    oas = ((1 - 2 / h) * second + first) / ((n + 1 - 2 / h) * (second - first / h))
    oas_as_implemented = (second / h**2 + mu**2) / ((n + 1) * (second / h**2 - mu**2 / h))
    for keep in ("features", "moments"):
        statistics = statistics_of(features, labels, keep)
        assert HScore(statistics, shrinkage="ledoit-wolf").intensity == pytest.approx(ledoit_wolf, rel=1e-10)
        assert HScore(statistics, shrinkage="oas").intensity == pytest.approx(oas_as_implemented, rel=1e-10)
    # The common implementation drops the 2/h terms of Eq. 23; they matter little at any real h.
    assert oas_as_implemented == pytest.approx(oas, rel=0.25)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_alignment_is_equation_10_and_least_at_uniform(seed, m):
    rng = np.random.default_rng(seed)
    gradients = rng.standard_normal((m, 4, 5))
    loss = Alignment(gram_of(torch.from_numpy(gradients)).numpy())
    uniform = np.full(m, 1 / m)
    for weights in rng.dirichlet(np.ones(m), size=5):
        expected = literal.alignment_loss(gradients, weights)
        assert float(alignment_loss(torch.from_numpy(gradients), torch.from_numpy(weights))) == pytest.approx(
            expected, rel=1e-9
        )
        assert loss(weights)[0] == pytest.approx(expected, rel=1e-9)
        assert loss(uniform)[0] <= expected + 1e-12
    mean = np.mean([g / np.linalg.norm(g) for g in gradients], axis=0)
    assert loss(uniform)[0] == pytest.approx(1 - np.linalg.norm(mean), rel=1e-9)
    assert np.abs(loss(uniform)[1]).max() < 1e-9  # flat: gradient descent from uniform never moves
    weights = rng.dirichlet(np.ones(m))
    assert check_grad(lambda a: loss(a)[0], lambda a: loss(a)[1], weights, epsilon=1e-7) < 1e-5


def test_zero_gradients_have_no_direction():
    gradients = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_dead = torch.cat([gradients, torch.zeros(1, 7)])
    weights = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    padded = torch.cat([weights, torch.tensor([5.0])])
    assert alignment_loss(with_dead, padded) == alignment_loss(gradients, weights)
    value, slope = Alignment(gram_of(with_dead).numpy())(padded.numpy())
    assert value == pytest.approx(float(alignment_loss(gradients, weights)))
    assert slope[3] == 0
    only_dead = np.array([0.0, 0.0, 0.0, 1.0])
    assert Alignment(gram_of(with_dead).numpy())(only_dead)[0] == 1.0
    with pytest.raises(PromptError, match="every gradient is zero"):
        alignment_loss(torch.zeros(2, 3), torch.ones(2))


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_constant_features_are_refused(keep):
    features, labels = data(30, 3, 4, 3)
    features[1] = 2.5
    with pytest.raises(PromptError, match=r"\[1\]"):
        HScore(statistics_of(features, labels, keep))
    with pytest.raises(DataError, match="constant"):
        h_score(features[1], labels)


@pytest.mark.parametrize(
    ("labels", "shrinkage", "error"),
    [
        (torch.zeros(30, dtype=torch.int64), "auto", DataError),
        (torch.zeros(29, dtype=torch.int64), "auto", DataError),
        (torch.arange(30) % 3, 1.0, OptionError),
        (torch.arange(30) % 3, -0.1, OptionError),
        (torch.arange(30) % 3, "magic", OptionError),
        (torch.arange(30) % 3, True, OptionError),
    ],
)
def test_bad_h_score_input(labels, shrinkage, error):
    with pytest.raises(error):
        h_score(data(30, 1, 4, 3)[0][0], labels, shrinkage=shrinkage)


@pytest.mark.parametrize(
    ("features", "found"),
    [(torch.zeros(30, 0), r"\[30, 0\]"), (torch.zeros(30), r"\[30\]"), (torch.zeros(30, 4).int(), ".* torch.int32"),
     (torch.zeros(30, 4).numpy(), "ndarray"), (None, "NoneType")],
    ids=["no width", "one-dimensional", "integers", "NumPy", "none"],
)  # fmt: skip
def test_features_that_are_none(features, found):
    with pytest.raises(DataError, match=rf"\[N, h\] and not empty, got {found}"):
        h_score(features, torch.arange(30) % 3)


@pytest.mark.parametrize("gradients", [torch.ones(3), torch.ones(3, 4).int(), torch.ones(3, 4).numpy()])
def test_gradients_that_are_none(gradients):
    for work in (gram_of, lambda g: alignment_loss(g, torch.ones(3))):
        with pytest.raises(DataError, match=r"floating point \[M, \.\.\.\]"):
            work(gradients)


def test_h_score_is_differentiable():
    features, labels = data(12, 1, 3, 3)
    features = features[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda f: h_score(f, labels, shrinkage=0.2), (features,))


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e155, 1e300])
def test_the_size_of_a_gradient_is_nothing_to_its_direction(size):
    """Also where its squares leave float64's range."""
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    scaled = gradients * torch.tensor([1.0, size, 1.0, 1.0], dtype=torch.float64)[:, None]
    # The same numbers, rounded once more: a few units of float64's last place.
    torch.testing.assert_close(gram_of(scaled), gram_of(gradients), rtol=0, atol=1e-14)
    torch.testing.assert_close(alignment_loss(scaled, weights), alignment_loss(gradients, weights), rtol=0, atol=1e-14)


def test_alignment_of_weights_that_are_not_finite_is_refused():
    with pytest.raises(OptionError, match="not finite"):
        alignment_loss(torch.ones(2, 3), torch.tensor([0.5, torch.nan]))


def test_gradients_that_are_not_finite_are_no_zeros():
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    gradients[1, 2] = torch.nan
    assert gram_of(gradients)[1].isnan().all()
    with pytest.raises(DataError, match="not finite"):
        alignment_loss(gradients, torch.full((4,), 0.25))
