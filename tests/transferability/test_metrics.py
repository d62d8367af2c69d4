"""Transferability metrics against their definitions, written out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from hgprompt import transferability as tr
from hgprompt.errors import DataError, OptionError


def _data(n=30, h=5, classes=3, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = rng.normal(size=(n, h)) + signal * rng.normal(size=(classes, h))[labels] + 2
    return torch.from_numpy(features), torch.from_numpy(labels)


def _probabilities(n=40, z=6, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.dirichlet(np.ones(z), size=n)), torch.from_numpy(rng.integers(0, 3, n))


@pytest.mark.parametrize(("n", "h"), [(30, 5), (12, 20)], ids=["tall", "wide"])
def test_log_me_is_the_largest_evidence(n, h):
    """Against the Gaussian y ~ N(0, I/β + FFᵀ/α) itself, maximised by SciPy over log α and log β."""
    features, labels = _data(n, h)
    f = features.numpy()
    best = []
    for c in range(3):
        y = (labels.numpy() == c).astype(float)

        def negative(x, y=y):
            cov = np.exp(-x[1]) * np.eye(n) + np.exp(-x[0]) * f @ f.T
            return -multivariate_normal.logpdf(y, np.zeros(n), cov) / n

        best.append(-min(minimize(negative, [a, b], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13}).fun
                         for a, b in ((0, 0), (3, 1), (1, 3))))  # fmt: skip
    # Nelder–Mead knows the maximum to about 1e-9; the evidence is flat there. Where the features can fit the labels
    # exactly, α/β → 0 is approached ever more slowly.
    assert tr.log_me(features, labels) == pytest.approx(np.mean(best), abs=1e-7 if n > h else 1e-6)


def test_log_me_prefers_features_that_tell():
    told, labels = _data(signal=3.0)
    noise, _ = _data(signal=0.0)
    assert tr.log_me(told, labels) > tr.log_me(noise, labels)


def test_log_me_of_an_exact_fit_is_finite():
    labels = torch.arange(12) % 2
    one_hot = torch.nn.functional.one_hot(labels, 2).double()
    assert math.isfinite(tr.log_me(one_hot, labels))


def test_transrate_by_eigenvalues():
    features, labels = _data(n=25, h=7)
    f = features.numpy() - features.numpy().mean(0)

    def rate(x):
        return 0.5 * np.log1p(np.linalg.eigvalsh(x.T @ x) / (len(x) * 0.01)).sum()

    y = labels.numpy()
    expected = rate(f) - sum((y == c).mean() * rate(f[y == c]) for c in range(3))
    assert tr.transrate(features, labels, eps=0.01) == pytest.approx(expected, rel=1e-10)
    assert tr.transrate(features[:, :1], labels) > 0  # the wide Gram matrix and the tall one


def test_trace_ratio_by_sums_of_squares():
    """The analysis of variance: total = between + within."""
    features, labels = _data()
    f, y = features.numpy(), labels.numpy()
    within = sum(((f[y == c] - f[y == c].mean(0)) ** 2).sum() for c in range(3))
    total = ((f - f.mean(0)) ** 2).sum()
    assert tr.trace_ratio(features, labels) == pytest.approx(1 - within / total, rel=1e-10)


def test_leep_by_loops():
    theta, labels = _probabilities()
    t, y = theta.numpy(), labels.numpy()
    n, z = t.shape
    total = 0.0
    for i in range(n):
        likelihood = 0.0
        for k in range(z):
            joint = sum(t[j, k] for j in range(n) if y[j] == y[i]) / n
            likelihood += joint / (t[:, k].sum() / n) * t[i, k]
        total += math.log(likelihood)
    assert tr.leep(theta, labels) == pytest.approx(total / n, rel=1e-12)


def test_leep_leaves_out_a_source_class_without_probability():
    theta, labels = _probabilities()
    wider = torch.cat([theta, torch.zeros(len(theta), 2, dtype=theta.dtype)], dim=1)
    assert tr.leep(wider, labels) == pytest.approx(tr.leep(theta, labels), rel=1e-12)


def test_nce_by_counting():
    z = torch.tensor([5, 5, 5, 9, 9, 2])
    y = torch.tensor([0, 0, 1, 1, 1, 3])
    # H(Y|Z): half of the images have z = 5, with probabilities 2/3 and 1/3; the others' labels are certain.
    expected = -0.5 * (2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3))
    assert tr.nce(z, y) == pytest.approx(expected, rel=1e-12)
    assert tr.nce(y, y) == 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(8, 40), classes=st.integers(2, 4))
def test_bounds_and_invariances(seed, n, classes):
    features, labels = _data(n, 4, classes, seed)
    assert 0 <= tr.trace_ratio(features, labels) <= 1 + 1e-12
    assert tr.transrate(features, labels) >= -1e-9  # a mutual information
    # Images in another order, classes of other names, features elsewhere and turned: nothing changes.
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    for metric in (tr.trace_ratio, tr.transrate):
        changed = metric((features[order] + 7) @ turn, labels[order] * 10 + 3)
        assert changed == pytest.approx(metric(features, labels), rel=1e-6, abs=1e-9)  # of log |I + F'F/(N eps)|
    assert tr.log_me(features[order] @ turn, labels[order] + 5) == pytest.approx(tr.log_me(features, labels), rel=1e-6)
    theta, y = _probabilities(n, 5, seed)
    assert tr.leep(theta, y) <= 1e-12
    hard = theta.argmax(1)
    assert -math.log(3) - 1e-12 <= tr.nce(hard, y) <= 0
    # With certain probabilities the two agree: LEEP's predictor is then the conditional frequency.
    certain = torch.nn.functional.one_hot(hard, 5).double()
    assert tr.leep(certain, y) == pytest.approx(tr.nce(hard, y), abs=1e-12)


@pytest.mark.parametrize("metric", [tr.trace_ratio, tr.transrate, tr.log_me])
def test_bad_features(metric):
    features, labels = _data()
    for bad, message in (
        (features[0], r"\[N, h\]"),
        (features[:, :0], "not empty"),
        (features.numpy(), "ndarray"),
        (features.long(), "floating"),
        (features * float("nan"), "NaN"),
        (torch.ones(30, 5), "constant"),
    ):
        with pytest.raises(DataError, match=message):
            metric(bad, labels)
    with pytest.raises(DataError, match="two classes"):
        metric(features, torch.zeros(30, dtype=torch.int64))
    with pytest.raises(DataError, match="one per image"):
        metric(features, labels[:7])


def test_bad_probabilities_and_options():
    theta, labels = _probabilities()
    for bad, message in (
        (theta * 2, "sum to 1"),
        (-theta, "negative"),
        (theta[0], r"\[N, Z\]"),
        (theta.long(), "int64"),
        (theta[:0], "sum to"),
    ):
        with pytest.raises(DataError, match=message):
            tr.leep(bad, labels[: len(bad)] if bad.ndim == 2 else labels)
    features, y = _data()
    with pytest.raises(OptionError, match="eps"):
        tr.transrate(features, y, eps=0.0)
    with pytest.raises(OptionError, match="tolerance"):
        tr.log_me(features, y, tolerance=0.0)
    with pytest.raises(DataError, match="no labels"):
        tr.nce(labels[:0], labels[:0])


@pytest.mark.parametrize("shape", [(20, 64), (200, 16)])
def test_log_me_knows_no_scale(shape):
    """log p(y | cF, α, β) has the maximum of log p(y | F, c²α, β): at any scale, also where γ would round to N."""
    features = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(shape[0]) % 3
    expected = tr.log_me(features, labels)
    for scale in (1e-9, 3.0, 1e8, 1e30):
        assert tr.log_me(scale * features, labels) == pytest.approx(expected, rel=1e-8)
        assert math.isfinite(tr.transrate(scale * features, labels))


def test_leep_of_probabilities_in_half_precision():
    """Rows of a softmax in bfloat16 sum to 1 within its rounding, and are taken for what they were rounded from."""
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    found = tr.leep(logits.bfloat16().softmax(1), labels)
    assert found == pytest.approx(tr.leep(logits.bfloat16().double().softmax(1), labels), abs=2e-3)


def test_leep_of_rows_that_miss_one():
    theta, labels = _probabilities()
    missed = theta * (1 + 9e-4 * torch.rand(len(theta), 1, generator=torch.Generator().manual_seed(0)).double())
    assert tr.leep(missed, labels) == pytest.approx(tr.leep(theta, labels), rel=1e-12)
