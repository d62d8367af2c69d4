"""Ill-conditioned input against 50 digits of mpmath: finite and right, or refused with a cause and a remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ill_conditioned import (
    PROBLEMS,
    SHRINKAGES,
    VARIANTS,
    WEIGHTS,
    duplicated_features,
    everywhere,
    exact_h,
    few_images,
    five_images,
    folds_in_order,
    identical_prompts,
    ids,
    in_batches,
    no_difference_between_classes,
    one_prompt_twice_another,
    problem_of,
    reference_gradient,
    reference_h,
)
from problems import data

import hgprompt
from hgprompt.errors import DataError, HGPromptError, OptionError, PromptError
from hgprompt.objective import HScore
from hgprompt.optimize import WeightProblem, jackknife_std, optimize_weights
from hgprompt.statistics import EnsembleStatistics
from hgprompt.uncertainty import rank_std, weight_error

# A division by zero that is put right afterwards would still be a warning in the caller's log.
pytestmark = pytest.mark.filterwarnings("error")


# H, its intensity and its gradient ------------------------------------------------------------------------------------

# Centring costs 4 of float64's 16 digits where the mean is 1e4 times the spread, and normal equations square the
# problem's condition: 8 digits are what is left in the worst of these problems.
CLOSE = {"rel": 1e-8, "abs": 1e-10}


@everywhere
@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_h_score_to_the_digits_that_float64_has(name, dtype, scale, shrinkage):
    features, labels = problem_of(name, dtype, scale)
    intensity, mixed, alone = reference_h(name, dtype, scale, shrinkage)
    assert float(hgprompt.h_score(features[0], labels, shrinkage=shrinkage)) == pytest.approx(alone, **CLOSE)
    for keep in ("features", "moments"):
        statistics = in_batches(features, labels, keep)
        assert statistics.h_score(torch.from_numpy(WEIGHTS), shrinkage=shrinkage) == pytest.approx(mixed, **CLOSE)
        score = HScore(statistics, shrinkage=shrinkage)
        assert score.intensity == pytest.approx(intensity, **CLOSE)
        value, gradient = score(WEIGHTS)
        assert value == pytest.approx(mixed, **CLOSE)
        assert np.isfinite(gradient).all()
        # H does not depend on the scale of α, so that its gradient is at right angles to α.
        assert gradient @ WEIGHTS == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("shrinkage", [0.0, "auto"])
@pytest.mark.parametrize("keep", ["features", "moments"])
def test_gradient_against_finite_differences(name, keep, shrinkage):
    features, labels = PROBLEMS[name]()
    score = HScore(in_batches(features, labels, keep), shrinkage=shrinkage)
    _, gradient = score(WEIGHTS)
    expected = reference_gradient(features, labels, score.intensity)
    # A derivative in the weight of a prompt is as large as its features are beside the mixture's: what float64 loses of
    # the largest is lost of all.
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["few images", "one faint dimension", "everything at once"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_h_score_is_differentiable(name, shrinkage):
    features, labels = PROBLEMS[name]()
    features = features.clone().requires_grad_()
    hgprompt.h_score(torch.tensordot(torch.from_numpy(WEIGHTS), features, 1), labels, shrinkage=shrinkage).backward()
    expected = reference_gradient(features.detach(), labels, shrinkage)
    slope = features.grad[0] / WEIGHTS[0]  # in the mixed features
    along = torch.stack([(slope * (f - f.mean(0))).sum() for f in features.detach()])
    # The derivative of a pseudo-inverse holds its square, and with it the square of the covariance's condition.
    np.testing.assert_allclose(along.numpy(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("intensity", [1e-300, 1e-17, 1e-14, 2e-13, 1e-10, 1e-6])
@pytest.mark.parametrize("make", [few_images, duplicated_features])
def test_the_faintest_shrinkage_is_none(make, keep, intensity):
    """A singular Σ stays singular in float64 when next to nothing is added."""
    features, labels = make()
    plain = (exact_h(features, labels, WEIGHTS), exact_h(features, labels, [1, 0, 0]))
    statistics = in_batches(features, labels, keep)
    # H moves in proportion to the intensity, by about the condition of what the images span.
    mixed, alone = (pytest.approx(value, abs=1e-9 + 100 * intensity) for value in plain)
    assert statistics.h_score(torch.from_numpy(WEIGHTS), shrinkage=intensity) == mixed
    assert float(hgprompt.h_score(features[0], labels, shrinkage=intensity)) == alone
    gradient = HScore(statistics, shrinkage=0.0)(WEIGHTS)[1]
    found = HScore(statistics, shrinkage=intensity)(WEIGHTS)[1]
    np.testing.assert_allclose(found, gradient, atol=1e-9 + 100 * intensity)


# What is made of it ---------------------------------------------------------------------------------------------------


def _on_simplex(weights) -> bool:
    return bool((weights >= 0).all()) and float(weights.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [v for v in VARIANTS if v[1:] == (torch.float64, 1.0) or v[0] == "everything at once"],
    ids=ids,
)
def test_weights_and_their_errors(name, dtype, scale, keep):
    features, labels = problem_of(name, dtype, scale)
    statistics = in_batches(features, labels, keep)
    for shrinkage in (0.0, "auto"):
        problem = WeightProblem(statistics, shrinkage=shrinkage, starts=2)
        solution = problem.solve(0.0)
        assert _on_simplex(solution.weights)
        found = solution.diagnostics
        assert 0 <= found.h_score <= (len(labels.unique()) - 1) * (1 + CLOSE["rel"])
        assert found.h_score >= found.uniform_h_score * (1 - CLOSE["rel"])
        assert problem.source_h_scores.isfinite().all()
        _check_errors(problem, solution, labels)


def _check_errors(problem, solution, labels):
    """Finite where each fold leaves two classes behind and holds two images; errors of H wherever features are kept."""
    left = [labels[folds_in_order(labels) != k] for k in range(2)]
    enough = len(labels) >= 4
    known = torch.tensor([len(part.unique()) >= 2 for part in left])
    rows = problem.jackknife(solution, None, 0.0)
    assert rows.shape == (2, problem.size)
    for row, row_known in zip(rows, known, strict=True):
        if enough and row_known:
            assert _on_simplex(row)
        else:
            assert row.isnan().all()
    complete = enough and bool(known.all())
    assert jackknife_std(rows).isfinite().all() == complete
    assert np.isfinite(weight_error(rows)) == complete
    kept = problem.statistics.keeps == "features"
    covariance, std = problem.source_covariance, problem.h_score_std(solution.weights)
    assert covariance.isfinite().all() == (kept or bool(known.all()))
    assert np.isfinite(std) == (kept or bool(known.all()))
    assert rank_std(problem.source_h_scores, covariance).isfinite().all() == covariance.isfinite().all()


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("solver", ["exponentiated-gradient", "projected-gradient"])
@pytest.mark.parametrize("name", ["five images", "two images and one", "identical prompts", "everything at once"])
def test_the_other_solvers(name, solver, keep):
    features, labels = PROBLEMS[name]()
    problem = WeightProblem(in_batches(features, labels, keep), solver=solver, starts=2, max_steps=20)
    solution = problem.solve(0.0)
    assert _on_simplex(solution.weights)
    rows = problem.jackknife(solution, None, 0.0)
    assert all(row.isnan().all() or _on_simplex(row) for row in rows)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_fold_that_takes_a_class_with_it_is_left_unknown(keep):
    features, _ = data(8, 3, 4, 2)
    labels = folds_in_order(torch.zeros(8))  # fold k holds all of class k
    for solver in ("quasi-newton", "projected-gradient"):
        problem = WeightProblem(in_batches(features, labels, keep), solver=solver, starts=2, max_steps=20)
        assert problem.jackknife(problem.solve(0.0), None, 0.0).isnan().all()
    assert np.isnan(problem.h_score_std(torch.from_numpy(WEIGHTS))) == (keep == "moments")


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_fold_that_holds_every_image_is_left_unknown(keep):
    """As when the ranks of a process group have one image each, which all go to the first fold."""
    features, labels = data(6, 3, 4, 2)
    statistics = EnsembleStatistics(keep=keep, folds=2)
    for n in range(6):
        statistics.merge(in_batches(features[:, n : n + 1], labels[n : n + 1], keep))
    problem = WeightProblem(statistics, starts=2)
    rows = problem.jackknife(problem.solve(0.0), None, 0.0)
    assert rows[0].isnan().all()
    assert _on_simplex(rows[1])
    assert np.isnan(weight_error(rows))


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_fold_with_nearly_all_of_the_variance(keep):
    """Subtracting it from the whole would leave rounding: one image is 1e7 times as far from the others as they are."""
    features, labels = data(16, 3, 4, 3)
    alone = folds_in_order(labels) == 1
    features[:, int((~alone).nonzero()[3])] *= 1e7
    score = HScore(in_batches(features, labels, keep), shrinkage=0.1)
    left = in_batches(features[:, alone], labels[alone], "features")
    expected_value, expected = HScore(left, shrinkage=0.1)(WEIGHTS)
    value, gradient = score.without_folds([WEIGHTS])[0][0]
    # Moments of the other images are about a centre of their own, or of one fold's first batch at the worst.
    assert value == pytest.approx(expected_value, rel=1e-7)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize(
    "make", [identical_prompts, no_difference_between_classes, five_images, one_prompt_twice_another]
)
def test_in_a_reduced_basis(make, keep):
    """From 128 features on, α is found in a basis of discriminants, here of few directions, or of none at all."""
    features, labels = make()
    wide = features.repeat(1, 1, 128 // features.shape[2] + 1)[..., :128]
    problem = WeightProblem(in_batches(wide, labels, keep), shrinkage=0.1, starts=3)
    solution = problem.solve(0.0)
    assert solution.diagnostics.converged
    assert _on_simplex(solution.weights)
    # Copies of features change H only through the share of the trace that one direction has of all.
    whole = WeightProblem(in_batches(wide, labels, keep), shrinkage=0.1, starts=3)
    whole._reduced = None
    assert solution.diagnostics.h_score == pytest.approx(whole.solve(0.0).diagnostics.h_score, abs=1e-5)
    _check_errors(problem, solution, labels)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_identical_prompts_may_be_weighted_at_will(keep):
    features, labels = identical_prompts()
    solution = optimize_weights(in_batches(features, labels, keep))
    assert _on_simplex(solution.weights)
    assert solution.diagnostics.converged
    assert solution.diagnostics.h_score == pytest.approx(solution.diagnostics.uniform_h_score, rel=1e-12)
    torch.testing.assert_close(solution.diagnostics.source_h_scores.std(), torch.zeros(()).double(), atol=1e-12, rtol=0)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_constant_prompt_is_refused(dtype, keep):
    features, labels = data(20, 3, 6, 3)
    features[1] = torch.linspace(0.1, 1000.7, 6)
    with pytest.raises(PromptError, match=r"prompts \[1\] give the same feature for every image.*leave them out"):
        HScore(in_batches(features.to(dtype), labels, keep))
    with pytest.raises(DataError, match=r"features are constant, the same for every image.*look for"):
        hgprompt.h_score(features[1].to(dtype), labels)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_both_representations_take_the_same_float64_features(keep):
    """A spread of 1e-8 of the mean is rounding in float32, but eight good digits in float64."""
    features, labels = data(20, 3, 4, 3)
    expected = HScore(in_batches(features, labels, keep), shrinkage=0.1)(WEIGHTS)[0]
    far = HScore(in_batches(features + 1e8, labels, keep), shrinkage=0.1)(WEIGHTS)[0]
    assert far == pytest.approx(expected, rel=1e-6)
    with pytest.raises(PromptError, match="same feature"):
        HScore(in_batches((features + 1e8).float(), labels, keep))


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("shrinkage", [0.0, "auto", 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prompts_that_cancel_one_another_are_refused(dtype, shrinkage, keep):
    features, labels = data(20, 3, 6, 3)
    features = features.to(dtype)
    features[2] = -features[0] - features[1]
    statistics = in_batches(features, labels, keep)
    with pytest.raises(PromptError, match=r"cancel one another.*leave out a prompt"):
        statistics.h_score(torch.from_numpy(WEIGHTS), shrinkage=shrinkage)
    with pytest.raises(PromptError, match="cancel one another"):
        optimize_weights(statistics, shrinkage=shrinkage)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("shrinkage", [0.0, "auto", 0.1])
def test_where_prompts_cancel_one_another_nothing_is_told(shrinkage, keep):
    """Two opposite prompts beside a third: at the point of the simplex where they leave nothing, H is 0, not noise."""
    features, labels = data(20, 3, 6, 3)
    features[1] = -features[0]
    statistics = in_batches(features + 3, labels, keep)
    value, gradient = HScore(statistics, shrinkage=shrinkage)(np.array([0.5, 0.5, 0.0]))
    assert value == 0
    assert not gradient.any()
    assert _on_simplex(optimize_weights(statistics, shrinkage=shrinkage).weights)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("scale", [1e-200, 1e-40, 1e40, 1e100, 1e160, 1e300])
def test_features_beyond_float64_squared_are_refused(scale, keep):
    features, labels = data(20, 3, 6, 3)
    expected = float(hgprompt.h_score(features[0], labels))
    assert float(hgprompt.h_score(features[0] * scale, labels)) == pytest.approx(expected, rel=1e-12)
    cause = "scale the features" if scale > 1e-150 else "same feature for every image"  # squares are all 0
    with pytest.raises(PromptError, match=rf"prompts \[0, 1, 2\].*{cause}"):
        HScore(in_batches(features * scale, labels, keep))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0, 0.0], "not all 0"),
        ([0.5, float("nan"), 0.5], "finite"),
        ([float("inf"), 0.0, 1.0], "finite"),
        ([1.0, 2.0], r"weights must be \[3\]"),
    ],
)
def test_weights_without_a_direction_are_refused(weights, message):
    statistics = in_batches(*data(20, 3, 6, 3), "features")
    with pytest.raises(OptionError, match=message):
        statistics.h_score(torch.tensor(weights))


def test_the_scale_of_weights_does_not_matter():
    statistics = in_batches(*data(20, 3, 6, 3), "features")
    weights = torch.from_numpy(WEIGHTS)
    for scale in (1e-300, 1e300):
        assert statistics.h_score(scale * weights) == pytest.approx(statistics.h_score(weights), rel=1e-12)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("n", [1, 5])
def test_one_class_is_refused(n, keep):
    features, _ = data(5, 3, 4, 2)
    labels = torch.full((n,), 10**6)
    for call in (
        lambda: HScore(in_batches(features[:, :n], labels, keep)),
        lambda: hgprompt.h_score(features[0, :n], labels),
    ):
        with pytest.raises(DataError, match=rf"at least two classes, got 1 in {n} images"):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    features, labels = data(20, 3, 6, 3)
    features[1, 4, 2] = bad
    with pytest.raises(DataError, match=r"prompt 1 are not finite.*look for NaN or overflow"):
        in_batches(features, labels, "features", batch=20)
    with pytest.raises(DataError, match="not finite"):
        hgprompt.h_score(features[1], labels)


# Anything -------------------------------------------------------------------------------------------------------------


@st.composite
def _degenerate_problems(draw):
    seed, m, n, h = (draw(st.integers(0, high)) for high in (10**6, 3, 11, 7))
    m, n, h = m + 1, n + 2, h + 1
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, draw(st.integers(2, n)), n))
    labels[:2] = torch.arange(2)
    features = torch.from_numpy(rng.standard_normal((m, n, h)))
    prompt, image, feature = (draw(st.integers(0, size - 1)) for size in (m, n, h))
    injuries = {
        "constant feature": lambda f: f[..., feature].fill_(0.1),
        "constant feature of one prompt": lambda f: f[prompt, :, feature].fill_(-7.3),
        "constant prompt": lambda f: f[prompt].fill_(0.3),
        "duplicated feature": lambda f: f[..., feature].copy_(f[..., 0]),
        "duplicated image": lambda f: f[:, image].copy_(f[:, 0]),
        "outlier": lambda f: f[:, image].mul_(1e9),
        "all images but one alike": lambda f: f[:, 1:].copy_(f[:, 1:2].clone().expand_as(f[:, 1:])),
        "identical prompts": lambda f: f.copy_(f[:1].clone().expand_as(f)),
        "opposite prompts": lambda f: f[prompt].copy_(-f[0]),
        "proportional prompts": lambda f: f[prompt].copy_(2 * f[0]),
        "faint feature": lambda f: f[..., feature].mul_(1e-6),
        "vanishing feature": lambda f: f[..., feature].mul_(1e-12),
        "faint prompt": lambda f: f[prompt].mul_(1e-9),
        "zero": lambda f: f.zero_(),
        "one class": lambda f: labels.zero_(),
        "far from zero": lambda f: f.add_(1e4),
    }
    for name in draw(st.lists(st.sampled_from(sorted(injuries)), max_size=3, unique=True)):
        injuries[name](features)
    scale = draw(st.sampled_from([1.0, 1.0, 1e-20, 1e20, 1e-120, 1e200]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return (features * scale).to(dtype), labels * draw(st.sampled_from([1, 10**6]))


@settings(deadline=None, max_examples=200)
@given(
    _degenerate_problems(),
    st.sampled_from(["features", "moments"]),
    st.sampled_from([0.0, 1e-14, "auto", "oas", 0.1, 0.999]),
    st.integers(1, 3),
)
def test_finite_or_refused(problem, keep, shrinkage, folds):
    features, labels = problem
    classes = len(labels.unique())
    try:
        value = float(hgprompt.h_score(features[0], labels, shrinkage=shrinkage))
        assert -1e-6 <= value <= classes - 1 + 1e-6
    except HGPromptError:
        pass
    try:
        whole = WeightProblem(in_batches(features, labels, keep, folds), shrinkage=shrinkage, starts=2, max_steps=20)
    except HGPromptError:
        return
    solution = whole.solve(0.0)
    assert _on_simplex(solution.weights)
    assert -1e-6 <= solution.diagnostics.h_score <= classes - 1 + 1e-6
    value, gradient = whole.score(np.full(whole.size, 1 / whole.size))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    rows = whole.jackknife(solution, None, 0.0)
    assert all(row.isnan().all() or _on_simplex(row) for row in rows)
    for number in (weight_error(rows), whole.h_score_std(solution.weights)):
        assert np.isnan(number) or (np.isfinite(number) and number >= 0)
    covariance = whole.source_covariance
    assert not covariance.isinf().any()
    assert not rank_std(whole.source_h_scores, covariance).isinf().any()


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_features_that_differ_in_their_last_digits(keep):
    """Of two images of two classes H is 1 without shrinkage, whatever the features are, if they differ at all."""
    rng = np.random.default_rng(0)
    ulp = np.spacing(1e4)
    solved = 0
    for m in (1, 2, 4):
        features = torch.from_numpy(1e4 + ulp * rng.integers(-40, 41, (m, 2, 1)))
        try:
            problem = WeightProblem(in_batches(features, torch.arange(2), keep, 1), shrinkage=0.0, starts=2)
        except HGPromptError:  # no further apart than rounding alone may put them
            continue
        solved += 1
        # Differences of neighbouring float64 numbers are exact: what is left is the rounding of small sums.
        assert problem.solve(0.0).diagnostics.h_score == pytest.approx(1, abs=1e-9)
    assert solved
