"""Solutions on the simplex: against SciPy, against each other, and how sure they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import data, random_gram, statistics_of
from scipy.optimize import minimize

from hgprompt import reduced_basis, simplex
from hgprompt.errors import OptionError
from hgprompt.objective import Alignment, HScore, Objective, gram_of
from hgprompt.optimize import WeightProblem, jackknife_std, optimize_weights
from hgprompt.statistics import EnsembleStatistics


def test_identical_prompts_make_alpha_indifferent():
    features, labels = data(40, 1, 6, 3)
    score = HScore(statistics_of(features.expand(4, -1, -1).clone(), labels), shrinkage=0.1)
    values = [score(w)[0] for w in np.random.default_rng(0).dirichlet(np.ones(4), size=5)]
    np.testing.assert_allclose(values, values[0], rtol=1e-10)
    assert optimize_weights(statistics_of(features.expand(4, -1, -1).clone(), labels)).diagnostics.gap < 1e-9


@pytest.mark.parametrize("shape", [(60, 4, 6, 3), (25, 5, 40, 4), (200, 8, 12, 6)], ids=str)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_solver_is_never_worse_than_scipy_from_many_starts(shape, lam):
    features, labels = data(*shape, seed=4)
    statistics = statistics_of(features, labels)
    gram = random_gram(shape[1])
    found = optimize_weights(statistics, gram, lam=lam)
    objective = Objective(HScore(statistics), Alignment(gram.numpy()), lam)
    m = shape[1]
    constraint = {"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like}
    best = min(
        minimize(
            objective,
            start,
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints=constraint,
            options={"ftol": 1e-13},
        ).fun
        for start in np.random.default_rng(1).dirichlet(np.ones(m), size=30)
    )
    assert found.diagnostics.objective <= best + 1e-6
    assert found.diagnostics.gap <= 1e-6
    weights = found.weights
    assert weights.dtype == torch.float64
    assert float(weights.min()) >= 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert found.diagnostics.objective == pytest.approx(objective(weights.numpy())[0], abs=1e-12)


def test_raw_and_normalised_objective():
    features, labels = data(60, 3, 6, 4)
    statistics, gram = statistics_of(features, labels), random_gram(3)
    raw = optimize_weights(statistics, gram, lam=0.5, normalize=False).diagnostics
    assert raw.objective == pytest.approx(-raw.h_score + 0.5 * raw.alignment_loss, rel=1e-12)
    scaled = optimize_weights(statistics, gram, lam=0.5).diagnostics
    assert scaled.objective == pytest.approx(-scaled.h_score / 3 + 0.5 * scaled.alignment_loss, rel=1e-12)


def test_alignment_alone_stays_uniform():
    features, labels = data(60, 4, 6, 3)
    heavy = optimize_weights(statistics_of(features, labels), random_gram(4), lam=1e6, tolerance=1e-3).weights
    torch.testing.assert_close(heavy, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-3, rtol=0)


def test_jackknife_matches_the_spread_of_fresh_samples():
    estimates, errors = [], []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(np.arange(240) % 3)
        means = np.random.default_rng(99).standard_normal((2, 3, 4))
        features = torch.from_numpy(rng.standard_normal((2, 240, 4)) + means[:, labels])
        statistics = statistics_of(features, labels, folds=8)
        problem = WeightProblem(statistics)
        solution = problem.solve(0.0)
        estimates.append(float(solution.weights[0]))
        errors.append(float(jackknife_std(problem.jackknife(solution, None, 0.0))[0]))
    # 24 samples know a standard deviation to about 15 %; the jackknife over 8 folds each to 27 %, averaged.
    assert np.median(errors) == pytest.approx(np.std(estimates), rel=0.5)


def test_jackknife_without_folds_is_nan():
    statistics = statistics_of(*data(30, 2, 4, 3))
    problem = WeightProblem(statistics)
    assert jackknife_std(problem.jackknife(problem.solve(0.0), None, 0.0)).isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"lam": -1.0},
        {"lam": float("nan")},
        {"gram": torch.eye(2)},
        {"solver": "magic"},
        {"starts": 0},
        {"shrinkage": 2},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(OptionError):
        optimize_weights(statistics_of(*data(30, 3, 4, 3)), **options)


@pytest.mark.parametrize("weights", [torch.ones(4), torch.ones(2), torch.tensor([1.0, 0.0, torch.nan]), [1.0, 0, 0]])
def test_weights_that_are_none(weights):
    problem = WeightProblem(statistics_of(*data(30, 3, 4, 3)))
    with pytest.raises(OptionError, match=r"tensor \[3\]"):
        problem.solve(1.0, warm=[weights])
    with pytest.raises(OptionError, match=r"tensor \[3\]"):
        problem.h_score_std(weights)


@pytest.mark.parametrize("keep", ["features", "moments"])
@pytest.mark.parametrize("shape", [(400, 6, 128, 5), (100, 5, 160, 4)], ids=str)
@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_reduced_basis_finds_what_the_whole_objective_has(shape, lam, keep, monkeypatch):
    statistics, gram = statistics_of(*data(*shape, signal=0.3), keep), random_gram(shape[1])
    fast = optimize_weights(statistics, gram, lam=lam)
    whole = Objective(HScore(statistics), Alignment(gram.numpy()), lam)
    value, gradient = whole(fast.weights.numpy())
    found = fast.diagnostics
    assert found.objective == pytest.approx(value, abs=1e-10)
    assert simplex.frank_wolfe_gap(fast.weights.numpy(), gradient) == pytest.approx(found.gap, abs=1e-7)
    assert found.gap <= 1e-6
    monkeypatch.setattr(reduced_basis, "SMALLEST_WIDTH", 10**9)
    slow = optimize_weights(statistics, gram, lam=lam)
    assert found.objective <= slow.diagnostics.objective + 1e-6  # both stop at that gap
    assert found.evaluations < slow.diagnostics.evaluations / 3
    np.testing.assert_allclose(found.source_h_scores, slow.diagnostics.source_h_scores, rtol=1e-9)
    assert found.uniform_h_score == pytest.approx(slow.diagnostics.uniform_h_score, rel=1e-9)


def test_many_classes_for_the_basis_are_solved_all_the_same():
    statistics = statistics_of(*data(300, 4, 128, 25, signal=0.3))  # 24 directions a point, 64 fit
    found = optimize_weights(statistics).diagnostics
    assert found.converged
    assert found.objective == pytest.approx(
        Objective(HScore(statistics), None, 0.0)(found.local_minima[0].numpy())[0], abs=1e-10
    )


@pytest.mark.parametrize("width", [6, 130])
def test_a_path_is_the_solutions_one_by_one(width):
    statistics, gram = statistics_of(*data(80, 4, width, 3)), random_gram(4)
    lams = [0.1, 3.0, 0.0]
    for lam, solution in zip(lams, WeightProblem(statistics, gram).path(lams), strict=True):
        alone = optimize_weights(statistics, gram, lam=lam).diagnostics
        assert solution.diagnostics.objective <= alone.objective + 1e-6
        assert solution.diagnostics.gap <= 1e-6


def test_a_gram_matrix_that_is_not_finite():
    with pytest.raises(OptionError, match="not finite"):
        WeightProblem(statistics_of(*data(30, 2, 4, 3)), torch.full((2, 2), float("nan")))


@pytest.mark.parametrize(
    "gram",
    [
        torch.eye(2).numpy(), torch.eye(2).int(), torch.eye(3), -torch.eye(2),
        torch.tensor([[1.0, 0.5], [0.2, 1.0]]), torch.tensor([[1.0, 1.5], [1.5, 1.0]]),
        torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
    ],
    ids=["array", "integers", "shape", "negative", "asymmetric", "no cosines", "of a dead prompt"],
)  # fmt: skip
def test_what_is_no_gram_matrix_is_refused(gram):
    with pytest.raises(OptionError, match="gram"):
        WeightProblem(statistics_of(*data(30, 2, 4, 3)), gram)


def test_gradients_of_any_length_are_normalised():
    statistics = statistics_of(*data(60, 3, 5, 3))
    gradients = torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = optimize_weights(statistics, gram_of(gradients), lam=0.5).weights
    gradients *= torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None]
    found = optimize_weights(statistics, gradients @ gradients.T, lam=0.5).weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the gap at which both stop


def test_features_are_no_statistics():
    with pytest.raises(OptionError, match="EnsembleStatistics, got Tensor"):
        optimize_weights(torch.randn(2, 30, 4))


@pytest.mark.parametrize("width", [6, 130])
def test_a_pool_without_a_prompt_is_that_pool(width):
    features, labels = data(80, 4, width, 3)
    gradients = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = (gradients / gradients.norm(dim=1, keepdim=True)) @ (gradients / gradients.norm(dim=1, keepdim=True)).T
    problem = WeightProblem(statistics_of(features, labels), gram, shrinkage=0.1)
    for i, solution in enumerate(problem.leave_one_out(0.2)):
        rest = [j for j in range(4) if j != i]
        alone = optimize_weights(statistics_of(features[rest], labels), gram[rest][:, rest], lam=0.2, shrinkage=0.1)
        assert solution.weights[i] == 0
        assert solution.diagnostics.objective == pytest.approx(alone.diagnostics.objective, abs=2e-6)
        assert solution.diagnostics.alignment_loss == pytest.approx(alone.diagnostics.alignment_loss, abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_warm_start_is_never_lost(seed):
    """Where each prompt tells other classes apart, there are minima all over: the search in a basis that has not seen
    the one it is given must not lead away from it (it did, in a fifth of these cases)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(240) % 8
    means = torch.randn(8, 192, generator=generator, dtype=torch.float64)
    features = 2 * torch.randn(240, 192, generator=generator, dtype=torch.float64).repeat(13, 1, 1)
    for prompt in features:
        own, alike = means.clone(), torch.randperm(8, generator=generator)[:6]
        own[alike] = own[alike].mean(0)
        prompt += own[labels] + 2 * torch.randn(240, 192, generator=generator, dtype=torch.float64)
    problem = WeightProblem(statistics_of(features, labels, "features"), shrinkage=0.05, starts=1)
    assert problem._reduced is not None  # else there is nothing to lose
    whole = Objective(problem.score, None, 0.0)
    draw = np.random.default_rng(seed)
    for _ in range(6):
        three = np.zeros(13)
        three[draw.choice(13, 3, replace=False)] = 1 / 3
        minimum = simplex.quasi_newton(whole, three, tolerance=1e-5)
        found = problem.solve(0.0, warm=[torch.from_numpy(minimum.weights)])
        assert found.diagnostics.objective <= minimum.value + 1e-9  # rounding, in a basis of hundreds of directions


def test_ablations():
    statistics, gram = statistics_of(*data(80, 4, 6, 3)), random_gram(4)
    rows = WeightProblem(statistics, gram).ablations(0.3)
    alone, both = (optimize_weights(statistics, gram, lam=lam) for lam in (0.0, 0.3))
    assert torch.equal(rows["h_score"].weights, alone.weights)
    assert torch.equal(rows["both"].weights, both.weights)
    torch.testing.assert_close(rows["alignment"].weights, torch.full((4,), 0.25, dtype=torch.float64))
    assert rows["alignment"].diagnostics.alignment_loss <= both.diagnostics.alignment_loss
    with pytest.raises(OptionError, match="gram"):
        WeightProblem(statistics).ablations(0.3)


@pytest.mark.parametrize(
    ("shape", "signal", "lam"),  # one minimum: which of several wins is a matter of luck
    [
        ((400, 5, 128, 4), 0.2, 0.3), ((400, 5, 128, 4), 0.2, 1.0),
        ((500, 6, 160, 30), 0.4, 1.0),  # more classes than the basis can hold eight minima of
    ],
    ids=str,
)  # fmt: skip
def test_jackknife_beside_every_fold_solved_by_itself(shape, signal, lam):
    statistics, gram = statistics_of(*data(*shape, signal=signal), folds=8), random_gram(shape[1])
    problem = WeightProblem(statistics, gram)
    assert problem._reduced is not None
    solution = problem.solve(lam)
    ours = jackknife_std(problem.jackknife(solution, [gram] * 8, lam))
    alone = []
    for k in range(8):
        score = HScore(statistics, shrinkage=problem.score.intensity, without_fold=k)
        objective = Objective(score, Alignment(gram.numpy()), lam)
        starts = solution.diagnostics.local_minima[:3].numpy()
        alone.append(min((simplex.quasi_newton(objective, s) for s in starts), key=lambda m: m.value).weights)
    # What a fold changes in the curvature, about 1/8 of it, is neglected.
    torch.testing.assert_close(ours, jackknife_std(torch.from_numpy(np.stack(alone))), rtol=0.3, atol=3e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_jackknife_does_not_depend_on_what_was_asked_before(seed):
    """Which leaves other directions in the basis."""
    statistics, gram = statistics_of(*data(300, 6, 128, 4, signal=0.3, seed=seed), folds=8), random_gram(6, seed)
    problem = WeightProblem(statistics, gram)
    solution = problem.solve(0.3)
    first = problem.jackknife(solution, [gram] * 8, 0.3)
    problem.leave_one_out(0.3)
    problem.path([0.0, 0.01, 1.0])
    again = problem.jackknife(solution, [gram] * 8, 0.3)
    # Both stop at a Frank–Wolfe gap of 1e-6 of objectives whose curvature is about 0.1: at weights 3e-3 apart.
    torch.testing.assert_close(jackknife_std(again), jackknife_std(first), rtol=0.02, atol=3e-3)


def test_jackknife_sees_a_second_minimum_that_is_as_good():
    features, labels = data(240, 2, 5, 3, signal=0.5)
    noise = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = torch.cat([features, features + 1e-3 * noise])
    statistics = statistics_of(twin, labels, folds=8)
    problem = WeightProblem(statistics)
    solution = problem.solve(0.0)
    assert jackknife_std(problem.jackknife(solution, None, 0.0)).max() > 0.05


def test_lambda_means_the_same_without_the_fold_that_held_a_class():
    """H is divided by C - 1 of the whole, also where a class is gone with its fold: against Algorithm 1 on that."""
    features, labels = data(60, 3, 4, 2, seed=1)
    statistics = EnsembleStatistics(keep="features", folds=3)
    labels[statistics.next_folds(60) == 1] = torch.arange(20) % 3
    statistics.update(features, labels)
    gram = random_gram(3, seed=2, shared=0.3)
    problem = WeightProblem(statistics, gram, max_steps=40, solver="projected-gradient", learning_rate=0.05)
    rows = problem.jackknife(problem.solve(0.5), [gram] * 3, 0.5)
    score = HScore(statistics, shrinkage=problem.score.intensity, without_fold=1)
    assert (problem.score.num_classes, score.num_classes) == (3, 2)

    def function(weights):
        (h, slope), (loss, pull) = score(weights), Alignment(gram.numpy())(weights)
        return -h / 2 + 0.5 * loss, -slope / 2 + 0.5 * pull

    expected = simplex.projected_gradient(function, np.full(3, 1 / 3), learning_rate=0.05, steps=40).weights
    np.testing.assert_allclose(rows[1].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("images", "known"), [(15, False), (16, True)])
def test_the_jackknife_wants_two_images_to_a_fold(images, known):
    statistics = EnsembleStatistics(folds=8)
    statistics.update(data(images, 3, 4, 2)[0], torch.arange(images) % 2)
    problem = WeightProblem(statistics)
    assert bool(problem.jackknife(problem.solve(0.0), None, 0.0).isfinite().all()) == known


def test_the_jackknife_is_refined_alike_by_whatever_solver():
    features, labels = data(120, 4, 6, 3)
    known = {}
    for solver in ("quasi-newton", "exponentiated-gradient"):
        problem = WeightProblem(statistics_of(features, labels, folds=4), solver=solver)
        solution = problem.solve(0.0)
        before = problem.score.evaluations
        known[solver] = problem.jackknife(solution, None, 0.0)
        assert problem.score.evaluations - before < 200  # steps of exponentiated gradient would be thousands
    # From minima that both solvers found to a gap of 1e-6.
    torch.testing.assert_close(*known.values(), rtol=0, atol=1e-2)


def test_by_projected_gradient_an_answer_does_not_depend_on_what_else_is_asked():
    features, labels = data(60, 4, 6, 3)
    problem = WeightProblem(
        statistics_of(features, labels), random_gram(4, seed=1), solver="projected-gradient", starts=1, max_steps=30
    )
    alone = problem.solve(0.0).weights
    assert torch.equal(problem.path([0.0, 0.1, 1.0])[0].weights, alone)
    assert float(problem.leave_one_out(0.0)[2].weights[2]) == 0
