"""Alternatives to Eq. 10 against their definitions on whole gradients, by autograd; and what their minima prefer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls

from hgprompt import simplex
from hgprompt.errors import DataError, OptionError, PromptError, StatisticsError
from hgprompt.objective import Alignment, HScore, Objective, gram_of
from hgprompt.sample import folds_of
from hgprompt.statistics import EnsembleStatistics
from hgprompt.transferability import (
    CrossFoldAlignment,
    Entropy,
    FisherMatching,
    GradientVariance,
    MinNorm,
    TargetAlignment,
    TraceRatio,
    top_k,
    trace_ratio,
)

FOLDS, M, SHAPE, CLASSES = 4, 5, (3, 7), 3


def _gradients(seed=0, *, folds=FOLDS, m=M, noise=1.0):
    """Fold gradients [folds, M, 3, 7]: half shared by all prompts, half a prompt's own, and noise on every fold."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal(SHAPE) + rng.standard_normal((m, *SHAPE))
    size = noise * rng.uniform(0.2, 2, (m, 1, 1))
    lengths = rng.uniform(0.1, 10, (m, 1, 1))
    return torch.from_numpy(lengths * (signal + size * rng.standard_normal((folds, m, *SHAPE))))


def _target(seed=0):
    """Gradients of a prompt outside the pool, [folds, 3, 7]."""
    return torch.from_numpy(np.random.default_rng(seed + 1000).standard_normal((FOLDS, *SHAPE)))


def _features(seed=0, m=M, n=40, h=6):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    features = rng.standard_normal((m, n, h)) + rng.uniform(0, 2, (m, 1, 1)) * rng.standard_normal(
        (m, CLASSES, h)
    )[:, labels]  # fmt: skip
    return torch.from_numpy(features + 3), torch.from_numpy(labels)


def _statistics(features, labels, keep="features", folds=1):
    statistics = EnsembleStatistics(keep=keep, folds=folds)
    statistics.update(features, labels)
    return statistics


# The definitions once more: loops over prompts and folds with whole gradients, α a torch tensor. No Gram matrices.


def _unit(g):
    return g / g.norm()


def _mix(weights, gradients):
    return sum(w * g for w, g in zip(weights, gradients, strict=True))


def target_alignment(weights, gradients, target):
    mixed = _mix(weights, [_unit(g) for g in gradients])
    return 1 - (_unit(mixed) * _unit(target)).sum()


def cross_fold(weights, gradients):
    """All leave-one-out mixtures laid end to end, and all targets: one cosine."""
    mixtures, targets = [], []
    for k in range(len(gradients)):
        elsewhere = torch.cat([gradients[:k], gradients[k + 1 :]])
        for i in range(len(weights)):
            others = [j for j in range(len(weights)) if j != i]
            mixtures.append(_mix(weights[others], [_unit(gradients[k, j]) for j in others]).flatten())
            targets.append(_unit(elsewhere[:, i].sum(0)).flatten())
    return 1 - _unit(torch.cat(mixtures)) @ _unit(torch.cat(targets))


def cross_fold_own(weights, gradients):
    mixtures, targets = [], []
    for k in range(len(gradients)):
        elsewhere = torch.cat([gradients[:k], gradients[k + 1 :]]).sum(0)
        mixtures.append(_mix(weights, [_unit(g) for g in gradients[k]]).flatten())
        targets.append(_unit(sum(_unit(g) for g in elsewhere)).flatten())
    return 1 - _unit(torch.cat(mixtures)) @ _unit(torch.cat(targets))


def min_norm(weights, gradients):
    return _mix(weights, gradients).square().sum()


def variance(weights, gradients):
    mixed = torch.stack([_mix(weights, fold).flatten() for fold in gradients])
    return mixed.var(0, correction=0).sum() / mixed.square().sum(1).mean()


def fisher(weights, gradients, target):
    own = _mix(weights, [_unit((gradients[:, i] ** 2).mean(0)) for i in range(len(weights))])
    return (own - _unit((target**2).mean(0))).square().sum()


def entropy(weights):
    return torch.special.xlogy(weights, weights).sum()


def between_share(weights, features, labels):
    mixed = _mix(weights, features)
    mixed = mixed - mixed.mean(0)
    means = torch.stack([mixed[labels == c].mean(0) for c in labels.tolist()])
    return -means.square().sum() / mixed.square().sum()


def _pairs(seed=0, m=M):
    """name → (function of α from small matrices, its definition on a torch α)."""
    g, t = _gradients(seed, m=m), _target(seed)
    whole, units = g.sum(0), torch.stack([torch.stack([_unit(x) for x in fold]) for fold in g])
    f, y = _features(seed, m)
    both = CrossFoldAlignment.from_gradients
    return {
        "target": (TargetAlignment.from_gradients(whole, t[0]), lambda w: target_alignment(w, whole, t[0])),
        "cross-fold": (both(g), lambda w: cross_fold(w, g)),
        "cross-fold with its own": (both(g, leave_own_out=False), lambda w: cross_fold_own(w, g)),
        "min-norm": (MinNorm.from_gradients(whole), lambda w: min_norm(w, [_unit(x) for x in whole])),
        "min-norm as is": (MinNorm.from_gradients(whole, normalize=False), lambda w: min_norm(w, whole)),
        "variance": (GradientVariance.from_gradients(g), lambda w: variance(w, units)),
        "variance as is": (GradientVariance.from_gradients(g, normalize=False), lambda w: variance(w, g)),
        "fisher": (FisherMatching.from_gradients(g, t), lambda w: fisher(w, g, t)),
        "towards uniform": (Entropy(), entropy),
        "away from uniform": (Entropy(towards_uniform=False), lambda w: -entropy(w)),
        "trace ratio": (TraceRatio.from_statistics(_statistics(f, y)), lambda w: between_share(w, f, y)),
        "trace ratio of moments": (
            TraceRatio.from_statistics(_statistics(f, y, "moments")),
            lambda w: between_share(w, f, y),
        ),
    }


NAMES = list(_pairs())
SCALE_FREE = [n for n in NAMES if n.startswith(("target", "cross", "variance", "trace"))]
CONVEX = ["min-norm", "min-norm as is", "fisher", "towards uniform"]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_definitions(name):
    function, definition = _pairs()[name]
    for draw in np.random.default_rng(0).dirichlet(np.ones(M), size=4):
        weights = torch.from_numpy(draw).requires_grad_()
        expected = definition(weights)
        (slope,) = torch.autograd.grad(expected, weights)
        value, gradient = function(draw)
        assert isinstance(value, float)
        assert gradient.dtype == np.float64
        # Both sides are float64 sums of a few hundred terms of order 1 (as is: up to 1e4, hence relative).
        assert value == pytest.approx(expected.item(), rel=1e-10, abs=1e-12)
        np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-9, atol=1e-11)


def _best(function, starts, **options):
    found = (simplex.quasi_newton(function, start, **options) for start in starts)
    return min(found, key=lambda minimum: minimum.value)


def _slsqp(function, starts):
    size = len(starts[0])
    return min(
        (
            minimize(
                function, start, jac=True, method="SLSQP", bounds=[(0, 1)] * size,
                constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
                options={"ftol": 1e-14, "maxiter": 500},
            ) for start in starts
        ),
        key=lambda minimum: minimum.fun,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_quasi_newton_finds_scipys_minimum(name):
    function, _ = _pairs(seed=3)[name]
    scale = max(1.0, abs(function(np.full(M, 1 / M))[0]))  # of gradients as they are
    found = _best(function, simplex.starting_points(function, M, 8, seed=0), tolerance=1e-8 * scale)
    reference = _slsqp(function, list(np.random.default_rng(1).dirichlet(np.ones(M), size=10)))
    # Both stop at about 1e-8; where the loss is not convex, several starts of either have to meet the lowest minimum.
    assert found.value == pytest.approx(reference.fun, abs=1e-7 * scale)
    assert found.converged


@pytest.mark.parametrize("name", CONVEX)
def test_convex_ones_reach_one_minimum_from_everywhere(name):
    function, _ = _pairs(seed=5)[name]
    starts = np.random.default_rng(0).dirichlet(np.ones(M), size=5)
    tolerance = 1e-8 * max(1.0, function(starts[0])[0])
    values = [simplex.quasi_newton(function, start, tolerance=tolerance).value for start in starts]
    # Of a convex function the Frank-Wolfe gap bounds the distance of a value from the minimum.
    assert max(values) - min(values) <= 2 * tolerance


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(0.01, 100))
def test_invariances(seed, factor):
    g, t = _gradients(seed), _target(seed)
    f, y = _features(seed)
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(M))
    order = rng.permutation(M)
    lengths = torch.from_numpy(rng.uniform(0.01, 100, (M, 1, 1)))

    def build(g, t, f):
        return {
            "target": TargetAlignment.from_gradients(g.sum(0), t[0]),
            "cross-fold": CrossFoldAlignment.from_gradients(g),
            "cross-fold with its own": CrossFoldAlignment.from_gradients(g, leave_own_out=False),
            "min-norm": MinNorm.from_gradients(g.sum(0)),
            "variance": GradientVariance.from_gradients(g),
            "fisher": FisherMatching.from_gradients(g, t),
            "trace ratio": TraceRatio.from_statistics(_statistics(f, y)),
            "entropy": Entropy(),
        }

    before, longer = build(g, t, f), build(g * lengths, t * factor, (f + 5) * factor)
    other_folds = torch.from_numpy(rng.permutation(FOLDS))
    moved = build(g[other_folds][:, order], t, f[order])
    for name, function in before.items():
        value, gradient = function(weights)
        # Each invariance moves only the rounding of float64.
        assert longer[name](weights)[0] == pytest.approx(value, rel=1e-8, abs=1e-10)
        permuted = moved[name](weights[order])
        assert permuted[0] == pytest.approx(value, rel=1e-9, abs=1e-11)
        np.testing.assert_allclose(permuted[1], gradient[order], rtol=1e-7, atol=1e-9)
        if name in SCALE_FREE:
            assert function(factor * weights)[0] == pytest.approx(value, rel=1e-9, abs=1e-11)
            # Euler: along α, a function that does not depend on its scale is flat.
            assert abs(gradient @ weights) < 1e-10
        low, high = {"min-norm": (0, 1), "fisher": (0, 2), "variance": (0, 1), "trace ratio": (-1, 0),
                     "entropy": (-np.log(M), 0)}.get(name, (0, 2))  # fmt: skip
        assert low - 1e-12 <= value <= high + 1e-12


def test_the_pools_own_mean_as_target_is_equation_10():
    """The degenerate case: L_align = 1 - ‖ḡ‖ cos(g_α, ḡ), so that uniform weights are best whatever the gradients."""
    whole = _gradients().sum(0)
    mean = torch.stack([_unit(g) for g in whole]).mean(0)
    function, literal = TargetAlignment.from_gradients(whole, mean), Alignment(gram_of(whole).numpy())
    for weights in np.random.default_rng(0).dirichlet(np.ones(M), size=4):
        expected = 1 - float(mean.norm()) * (1 - function(weights)[0])
        assert literal(weights)[0] == pytest.approx(expected, rel=1e-12)
    assert np.abs(function(np.full(M, 1 / M))[1]).max() < 1e-12


def test_target_alignment_projects_the_target_onto_the_cone():
    """Non-negative least squares (Lawson & Hanson) on whole gradients finds the same direction."""
    whole, target = _gradients(2).sum(0), _gradients(2).sum((0, 1)) + 4 * _target(2)[0]
    function = TargetAlignment.from_gradients(whole, target)
    units = np.stack([_unit(g).flatten().numpy() for g in whole])
    expected, _ = nnls(units.T, target.flatten().numpy())
    found = simplex.quasi_newton(function, np.full(M, 1 / M), tolerance=1e-12)
    # A gap of 1e-12 of a loss with curvature of order 1 leaves about its root in α.
    np.testing.assert_allclose(found.weights, expected / expected.sum(), atol=1e-5)
    assert np.abs(found.weights - 1 / M).max() > 0.1


def _exact(cosines, folds=3):
    """The same gradients on every fold, with these cosines."""
    root = torch.linalg.cholesky(torch.tensor(cosines, dtype=torch.float64) + 1e-12 * torch.eye(len(cosines)))
    return root.expand(folds, -1, -1)


UNIFORM = np.full(3, 1 / 3)


def test_cross_fold_alignment_without_its_own_is_not_uniform_without_noise():
    """Two prompts agree, a third is at right angles: no weight for it. In Eq. 10, and in the form with the prompt's own
    gradient in the target, noise is the only thing that moves weights, and here is none."""
    g = _exact([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]])
    found = simplex.quasi_newton(CrossFoldAlignment.from_gradients(g), UNIFORM, tolerance=1e-12)
    np.testing.assert_allclose(found.weights, [0.5, 0.5, 0], atol=1e-5)  # by symmetry; the root of the gap
    own = CrossFoldAlignment.from_gradients(g, leave_own_out=False)
    assert np.abs(own(UNIFORM)[1]).max() < 1e-9  # stationary, up to the 1e-12 that made the cosines definite
    # In general: of 20 pools without noise, none is at rest at uniform weights, and all are in the other form.
    for seed in range(20):
        g = _gradients(seed, noise=0.0)
        uniform = np.full(M, 1 / M)
        assert np.abs(CrossFoldAlignment.from_gradients(g)(uniform)[1]).max() > 1e-3
        own = CrossFoldAlignment.from_gradients(g, leave_own_out=False)
        assert np.abs(own(uniform)[1]).max() < 1e-12
        # Equal row sums of K is the exception: here by symmetry.
    alike = CrossFoldAlignment.from_gradients(_exact([[1.0, 0.3, 0.3], [0.3, 1.0, 0.3], [0.3, 0.3, 1.0]]))
    assert np.abs(alike(UNIFORM)[1]).max() < 1e-9


@pytest.mark.parametrize("leave_own_out", [True, False])
def test_cross_fold_alignment_punishes_noise(leave_own_out):
    """Three prompts share a direction; the fourth's gradient is another one on every fold."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(400)
    g = torch.from_numpy(np.stack([shared + noise * rng.standard_normal((6, 400)) for noise in (0.1, 0.5, 1.5)], 1))
    g = torch.cat([g, torch.from_numpy(rng.standard_normal((6, 1, 400)))], dim=1)
    function = CrossFoldAlignment.from_gradients(g, leave_own_out=leave_own_out)
    weights = simplex.quasi_newton(function, np.full(4, 0.25)).weights
    # Directions in 400 dimensions are at right angles within 0.05: a tenth of an equal share is beyond chance.
    assert weights[3] < 0.025
    assert weights[0] > weights[1] > weights[2] > weights[3]


def test_no_agreement_at_all_leaves_cross_fold_alignment_indifferent():
    function = CrossFoldAlignment.from_gradients(torch.eye(4, dtype=torch.float64).expand(3, -1, -1))
    for weights in np.random.default_rng(0).dirichlet(np.ones(4), size=3):
        value, gradient = function(weights)
        assert value == pytest.approx(1, abs=1e-15)
        assert np.abs(gradient).max() < 1e-15


def test_min_norm_of_two_gradients_in_closed_form():
    """Sener & Koltun's Algorithm 1: the weight of g_1 is ⟨g_2 - g_1, g_2⟩ / ‖g_1 - g_2‖², clipped to [0, 1]."""
    for first, second in (([1.0, 0.2], [-0.5, 1.0]), ([1.0, 0.0], [3.0, 0.5])):
        g1, g2 = np.array(first), np.array(second)
        expected = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0, 1)
        function = MinNorm.from_gradients(torch.tensor([first, second]), normalize=False)
        found = simplex.quasi_newton(function, np.array([0.5, 0.5]), tolerance=1e-12)
        assert found.weights[0] == pytest.approx(expected, abs=1e-6)  # float32 input


def test_min_norm_direction_descends_for_every_prompt():
    """At the minimum, -g_α is at least as far along -g_i as its own length, for every prompt."""
    whole = _gradients(4).sum(0).flatten(1).numpy()
    found = simplex.quasi_newton(MinNorm(whole @ whole.T), np.full(M, 1 / M), tolerance=1e-7)
    mixed = found.weights @ whole
    assert found.value == pytest.approx(mixed @ mixed, rel=1e-10)
    assert (whole @ mixed).min() >= mixed @ mixed * (1 - 1e-6)  # the gap, relative to a value above 1
    assert mixed @ mixed > 1


def test_gradient_variance_prefers_what_comes_back():
    exact, noisy = _gradients(noise=0.0), _gradients(noise=1.0)
    for weights in np.random.default_rng(0).dirichlet(np.ones(M), size=3):
        assert GradientVariance.from_gradients(exact)(weights)[0] == pytest.approx(0, abs=1e-15)
    g = torch.cat([exact[:, :1], noisy[:, 1:]], dim=1)
    function = GradientVariance.from_gradients(g)
    found = _best(function, simplex.starting_points(function, M, 8, seed=0), tolerance=1e-10)
    assert found.weights[0] > 0.99  # the only one without noise: V = 0 at the vertex, reached to the gap
    # Folds that contradict each other: no mean, nothing but noise.
    flip = torch.stack([exact[0], -exact[0]])
    assert GradientVariance.from_gradients(flip)(np.full(M, 1 / M))[0] == pytest.approx(1, abs=1e-12)


def test_gradient_variance_of_independent_noise():
    """Two prompts share a signal and differ in the size s of their noise: inverse-variance weights, α ∝ 1/s²."""
    a = np.array([1.0, 0, 0, 0, 0, 0])
    flips = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])  # every mean is exact, every pair uncorrelated
    g = (
        np.stack([a + 0.3 * s * np.eye(6)[1] for s in flips[:, 0]]),
        np.stack([a + 0.6 * s * np.eye(6)[2] for s in flips[:, 1]]),
    )
    function = GradientVariance.from_gradients(torch.from_numpy(np.stack(g, 1)), normalize=False)
    found = simplex.quasi_newton(function, np.array([0.5, 0.5]), tolerance=1e-12)
    np.testing.assert_allclose(found.weights, [0.8, 0.2], atol=1e-5)  # 1/0.3² : 1/0.6² = 4 : 1; the root of the gap


def test_fisher_matching_finds_a_target_in_the_hull():
    """A target whose Fisher information is 0.7 F̂_1 + 0.3 F̂_3 gets these weights, at distance 0 after normalising."""
    g = _gradients(1)
    profiles = torch.stack([_unit((g[:, i] ** 2).mean(0)) for i in range(M)])
    target = (0.7 * profiles[1] + 0.3 * profiles[3]).sqrt()[None]  # one image whose squares are the mixture
    function = FisherMatching.from_gradients(g, target)
    found = simplex.quasi_newton(function, np.full(M, 1 / M), tolerance=1e-12)
    # F̂_t is the mixture divided by its length below 1, so slightly outside the hull; the direction still decides.
    assert set(np.argsort(found.weights)[-2:]) == {1, 3}
    alone = FisherMatching.from_gradients(g, g[:, 2])
    np.testing.assert_allclose(
        simplex.quasi_newton(alone, np.full(M, 1 / M), tolerance=1e-13).weights, np.eye(M)[2], atol=1e-5
    )  # the distance is 0 at that vertex; a gap of 1e-13 leaves about its root


def test_entropy_at_the_corners():
    pull, push = Entropy(), Entropy(towards_uniform=False)
    corner = np.array([0.0, 1.0, 0.0])
    for function in (pull, push):
        value, gradient = function(corner)
        assert value == 0
        assert np.isfinite(gradient).all()
    assert simplex.frank_wolfe_gap(corner, push(corner)[1]) == 0
    found = simplex.quasi_newton(pull, corner)
    np.testing.assert_allclose(found.weights, UNIFORM, atol=1e-4)  # within the default gap of 1e-6
    assert pull(UNIFORM)[0] == pytest.approx(-np.log(3), rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=7), st.data())
def test_top_k_is_the_nearest_sparse_point(point, data):
    """Against brute force: every support of k entries, with the nearest point on its simplex."""
    from itertools import combinations

    k = data.draw(st.integers(1, len(point)))
    point = np.array(point)
    found = top_k(point, k)
    assert (found > 0).sum() <= k
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    distances = []
    for support in map(list, combinations(range(len(point)), k)):
        candidate = np.zeros(len(point))
        candidate[support] = simplex.project(point[support])
        distances.append(np.square(candidate - point).sum())
    assert np.square(found - point).sum() == pytest.approx(min(distances), rel=1e-9, abs=1e-12)


def test_top_k_keeps_the_first_of_equals_and_takes_tensors():
    np.testing.assert_allclose(top_k(torch.full((4,), 0.25), 2), [0.5, 0.5, 0, 0])
    # 0.3 is taken away and added evenly to the two that stay.
    np.testing.assert_allclose(top_k([0.5, 0.2, 0.1, 0.2], 2), [0.65, 0.35, 0, 0])
    np.testing.assert_array_equal(top_k([0.2, 0.8], 2), [0.2, 0.8])


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_trace_ratio_at_a_vertex_is_the_metric(keep):
    features, labels = _features()
    function = TraceRatio.from_statistics(_statistics(features, labels, keep))
    for vertex, f in zip(np.eye(M), features, strict=True):
        assert function(vertex)[0] == pytest.approx(-trace_ratio(f, labels), rel=1e-10)
    statistics = _statistics(features, labels, keep, folds=4)
    folded = TraceRatio.from_statistics(statistics, without_fold=1)
    rest = torch.from_numpy(folds_of(np.arange(len(labels)), 4)) != 1
    assert folded(np.eye(M)[2])[0] == pytest.approx(-trace_ratio(features[2, rest], labels[rest]), rel=1e-10)


def test_each_takes_the_place_of_equation_10():
    features, labels = _features()
    score = HScore(_statistics(features, labels))
    weights = np.full(M, 1 / M)
    for function, _ in _pairs().values():
        value, gradient = Objective(score, function, 0.5)(weights)
        alone, slope = Objective(score, None, 0.5)(weights)
        assert value == pytest.approx(alone + 0.5 * function(weights)[0], rel=1e-12)
        np.testing.assert_allclose(gradient, slope + 0.5 * function(weights)[1], rtol=1e-12)


def test_identical_prompts_make_alpha_indifferent():
    one, t = _gradients(m=1), _target()
    g = one.expand(-1, 4, *SHAPE)
    features, labels = _features(m=1)
    functions = [
        TargetAlignment.from_gradients(g.sum(0), t[0]),
        CrossFoldAlignment.from_gradients(g, leave_own_out=False),
        MinNorm.from_gradients(g.sum(0)),
        GradientVariance.from_gradients(g),
        FisherMatching.from_gradients(g, t),
        TraceRatio.from_statistics(_statistics(features.expand(4, -1, -1).clone(), labels)),
    ]
    for function in functions:
        values = [function(w)[0] for w in np.random.default_rng(0).dirichlet(np.ones(4), size=4)]
        np.testing.assert_allclose(values, values[0], rtol=1e-12)
        assert simplex.quasi_newton(function, np.full(4, 0.25), tolerance=1e-12).steps == 0
    # The exception: leave-one-out mixtures as long as their targets are best, and that is an even split.
    best = simplex.quasi_newton(CrossFoldAlignment.from_gradients(g), np.array([0.7, 0.1, 0.1, 0.1]), tolerance=1e-12)
    np.testing.assert_allclose(best.weights, 0.25, atol=1e-5)  # the root of the gap


def test_a_prompt_without_direction_has_no_effect():
    g = _gradients()
    dead = torch.cat([g, torch.zeros(FOLDS, 1, *SHAPE)], dim=1)
    weights = np.random.default_rng(0).dirichlet(np.ones(M))
    padded, only_dead = np.append(weights, 5.0), np.append(np.zeros(M), 1.0)
    for make in (
        lambda g: TargetAlignment.from_gradients(g.sum(0), _target()[0]),
        CrossFoldAlignment.from_gradients,
        lambda g: CrossFoldAlignment.from_gradients(g, leave_own_out=False),
        GradientVariance.from_gradients,
    ):
        value, gradient = make(dead)(padded)
        assert value == pytest.approx(make(g)(weights)[0], rel=1e-12)
        assert gradient[M] == 0
        value, gradient = make(dead)(only_dead)  # Σ α_i ĝ_i = 0
        assert value == 1
        assert not gradient.any()
        # A fold without images changes nothing.
        assert make(torch.cat([dead, torch.zeros(1, M + 1, *SHAPE)]))(padded)[0] == pytest.approx(
            make(g)(weights)[0], rel=1e-12
        )


def test_gradients_that_cancel():
    g = torch.stack([torch.ones(4), -torch.ones(4), torch.tensor([1.0, 0, 0, 0])]).double()
    half = np.array([0.5, 0.5, 0.0])
    value, gradient = TargetAlignment.from_gradients(g, torch.ones(4))(half)
    assert (value, gradient.tolist()) == (1.0, [0.0, 0.0, 0.0])
    assert MinNorm.from_gradients(g)(half)[0] == 0
    features, labels = _features(m=1)
    opposite = TraceRatio.from_statistics(_statistics(torch.cat([features, -features]), labels))
    value, gradient = opposite(np.array([0.5, 0.5]))
    assert (value, gradient.tolist()) == (0.0, [0.0, 0.0])


def test_one_prompt():
    g, t = _gradients(m=1), _target()
    for function in (
        TargetAlignment.from_gradients(g.sum(0), t[0]),
        CrossFoldAlignment.from_gradients(g, leave_own_out=False),
        MinNorm.from_gradients(g.sum(0)),
        GradientVariance.from_gradients(g),
        FisherMatching.from_gradients(g, t),
        Entropy(),
    ):
        assert simplex.quasi_newton(function, np.ones(1)).weights.tolist() == [1.0]
    with pytest.raises(PromptError, match="leave_own_out=False"):
        CrossFoldAlignment.from_gradients(g)


def test_bad_gradients():
    g, t = _gradients(), _target()
    both = (CrossFoldAlignment.from_gradients, GradientVariance.from_gradients)
    for make in both:
        with pytest.raises(OptionError, match="two folds"):
            make(g[:1])
        with pytest.raises(OptionError, match=r"\[n, M, \.\.\.\]"):
            make(g[0, 0, 0])
        with pytest.raises(DataError, match="not finite"):
            make(g * float("nan"))
        with pytest.raises(PromptError, match="every gradient is zero"):
            make(torch.zeros_like(g))
    with pytest.raises(PromptError, match="cancel"):
        CrossFoldAlignment.from_gradients(torch.stack([g[:, 0], -g[:, 0]], 1), leave_own_out=False)
    with pytest.raises(PromptError, match="every gradient is zero"):
        TargetAlignment.from_gradients(0 * g[0], t[0])
    for make in (TargetAlignment.from_gradients, FisherMatching.from_gradients):
        gradients, target = (g[0], t[0]) if make == TargetAlignment.from_gradients else (g, t)
        with pytest.raises(PromptError, match="target"):
            make(gradients, 0 * target)
        with pytest.raises(OptionError, match="sizes differ"):
            make(gradients, target[..., :2])
        with pytest.raises(OptionError, match="floating point"):
            make(gradients.long(), target)
    g[:, 3] = 0
    with pytest.raises(PromptError, match=r"\[3\].*leave them out"):
        MinNorm.from_gradients(g.sum(0))
    with pytest.raises(PromptError, match=r"\[3\].*leave them out"):
        FisherMatching.from_gradients(g, t)


def test_bad_matrices():
    eye, vector = np.eye(2), np.zeros(2)
    for make in (
        lambda k: TargetAlignment(k, vector), MinNorm, lambda k: FisherMatching(k, vector),
        lambda k: GradientVariance(0 * eye, k), lambda k: TraceRatio(0 * eye, k),
    ):  # fmt: skip
        for bad in (eye[:1], np.zeros((0, 0)), eye * np.nan, -eye, np.array([[1.0, 0.5], [0.0, 1.0]])):
            with pytest.raises(OptionError):
                make(bad)
        with pytest.raises(PromptError):
            make(0 * eye)
        make(torch.eye(2, dtype=torch.float32))
    for make in (TargetAlignment, FisherMatching):
        with pytest.raises(OptionError, match=r"\[2\] for 2 prompts"):
            make(eye, np.zeros(3))
        with pytest.raises(OptionError, match="normalise"):
            make(eye, np.array([0.0, 3.0]))
    with pytest.raises(OptionError, match="normalise"):
        FisherMatching(2 * eye, vector)
    with pytest.raises(OptionError, match="same folds"):
        GradientVariance(2 * eye, eye)
    with pytest.raises(OptionError, match="sizes differ"):
        TraceRatio(np.eye(3), eye)
    for weights, k in (([0.5, 0.5], 0), ([0.5, 0.5], 3), ([], 1), ([np.nan, 1], 1), (eye, 1)):
        with pytest.raises(OptionError):
            top_k(weights, k)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_bad_statistics(keep):
    features, labels = _features()
    with pytest.raises(StatisticsError, match="no images"):
        TraceRatio.from_statistics(EnsembleStatistics(keep=keep))
    with pytest.raises(DataError, match="two classes"):
        TraceRatio.from_statistics(_statistics(features, 0 * labels, keep))
    with pytest.raises(StatisticsError, match="no images are left"):
        TraceRatio.from_statistics(_statistics(features, labels, keep), without_fold=0)
    features[1] = 2.5
    with pytest.raises(PromptError, match=r"\[1\]"):
        TraceRatio.from_statistics(_statistics(features, labels, keep))
