"""Ill-conditioned problems, and H of them with 50 digits.

The reference shares no step with the package: no covariance is inverted where Eq. 5 is taken to the letter (H is then
the squared length of the classes' indicators along the columns of the features), and gradients are differences of H
over a step that 50 digits bear and float64 would not.
"""

from __future__ import annotations

from functools import cache

import mpmath as mp
import numpy as np
import pytest
import torch
from problems import data

from hgprompt.sample import folds_of
from hgprompt.statistics import EnsembleStatistics

DIGITS = 50
SHRINKAGES = [0.0, "auto", "oas", 0.1]
WEIGHTS = np.array([0.2, 0.5, 0.3])


# Problems -------------------------------------------------------------------------------------------------------------


def few_images():
    return data(8, 3, 12, 3)


def five_images():
    return data(5, 3, 12, 2)


def _five_images_three_dimensions():
    return data(5, 3, 3, 2)


def duplicated_features():
    features, labels = data(20, 3, 8, 3)
    features[..., 4:] = features[..., :4]
    return features, labels


def _one_image_in_a_class():
    features, _ = data(16, 3, 4, 3)
    labels = torch.arange(16) % 2
    labels[7] = 2
    return features, labels


def _far_from_zero():
    features, labels = data(20, 3, 6, 3)
    return features + 1e4, labels


def _constant_feature():
    features, labels = data(20, 3, 6, 3)
    features[..., 2] = 0.1  # whose mean over 20 images is not 0.1 in floating point
    return features, labels


def _constant_feature_of_one_prompt():
    features, labels = data(20, 3, 6, 3)
    features[1, :, 2] = 0.1
    return features, labels


def _more_classes_than_half_the_images():
    return data(12, 3, 5, 8)


def _every_image_its_own_class():
    features, _ = data(6, 3, 3, 2)
    return features, torch.arange(6)


def _one_faint_dimension():
    features, labels = data(20, 3, 6, 3)
    features[..., 1] *= 1e-6
    return features, labels


def identical_prompts():
    features, labels = data(20, 3, 6, 3)
    features[1:] = features[0]
    return features, labels


def one_prompt_twice_another():
    features, labels = data(20, 3, 6, 3)
    features[1] = 2 * features[0]
    return features, labels


def _labels_far_apart():
    features, labels = data(20, 3, 6, 2)
    return features, labels * 10**6


def _two_images_and_one():
    features, _ = data(3, 3, 4, 2)
    return features, torch.tensor([0, 1, 0])


def _two_images():
    features, _ = data(2, 3, 4, 2)
    return features, torch.tensor([0, 1])


def _one_dimension():
    return data(20, 3, 1, 2)


def no_difference_between_classes():
    features, _ = data(6, 3, 4, 2)
    return torch.cat([features, features], dim=1), torch.arange(12) // 6


def _everything_at_once():
    features, labels = data(7, 3, 10, 5)
    features[..., 5:8] = features[..., :3]
    features[..., 8] *= 1e-3
    features[..., 9] = 0.7
    features[2] = 2 * features[0]
    return features + 1e4, labels * 10**5


def _prompts_of_unlike_scale():
    features, labels = data(12, 3, 5, 3)
    return features * torch.tensor([1e-6, 1.0, 1e6])[:, None, None], labels


PROBLEMS = {
    problem.__name__.strip("_").replace("_", " "): problem
    for problem in (
        few_images, five_images, _five_images_three_dimensions, duplicated_features, _one_image_in_a_class,
        _far_from_zero, _constant_feature, _constant_feature_of_one_prompt, _more_classes_than_half_the_images,
        _every_image_its_own_class, _one_faint_dimension, identical_prompts, one_prompt_twice_another,
        _labels_far_apart, _two_images_and_one, _two_images, _one_dimension, no_difference_between_classes,
        _everything_at_once, _prompts_of_unlike_scale,
    )
}  # fmt: skip
SCALES = {torch.float64: (1.0, 1e-20, 1e20), torch.float32: (1.0, 1e-15, 1e15)}
VARIANTS = [(name, dtype, 1.0) for name in PROBLEMS for dtype in SCALES]
VARIANTS += [
    (name, dtype, scale)
    for name in ("few images", "duplicated features", "one faint dimension", "everything at once")
    for dtype, scales in SCALES.items()
    for scale in scales[1:]
]


def in_batches(features, labels, keep, folds=2, batch=3):
    """In batches, so that moments are moved from one pilot centre to another, as in a stream."""
    statistics = EnsembleStatistics(keep=keep, folds=folds)
    for start in range(0, len(labels), batch):
        statistics.update(features[:, start : start + batch], labels[start : start + batch])
    return statistics


def folds_in_order(labels, folds=2):
    return torch.from_numpy(folds_of(np.arange(len(labels)), folds))


def problem_of(name: str, dtype: torch.dtype, scale: float):
    features, labels = PROBLEMS[name]()
    return (features * scale).to(dtype), labels


def ids(value):
    return str(value).removeprefix("torch.")


everywhere = pytest.mark.parametrize(("name", "dtype", "scale"), VARIANTS, ids=ids)


# References -----------------------------------------------------------------------------------------------------------


def _exact(features) -> list:
    """[N, h] in mpmath, bit for bit, less the mean."""
    rows = [[mp.mpf(x) for x in row] for row in features.double().tolist()]
    means = [mp.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    return [[x - mean for x, mean in zip(row, means, strict=True)] for row in rows]


def _mixed(features: list, weights: list) -> list:
    return [[mp.fdot(weights, entries) for entries in zip(*rows, strict=True)] for rows in zip(*features, strict=True)]


def _covariance(f: list) -> list:
    columns = list(zip(*f, strict=True))
    return [[mp.fdot(x, y) / len(f) for y in columns] for x in columns]


def _intensity(f: list, shrinkage) -> mp.mpf:
    """Ledoit & Wolf 2004, lemmas 3.2–3.4; OAS as commonly implemented (see `hgprompt.objective`)."""
    if not isinstance(shrinkage, str):
        return mp.mpf(shrinkage)
    n, h, sigma = len(f), len(f[0]), _covariance(f)
    mean = mp.fsum(sigma[k][k] for k in range(h)) / h
    distance = mp.fsum((sigma[k][l] - (k == l) * mean) ** 2 for k in range(h) for l in range(h))
    if distance == 0:  # Σ is its own target: shrinking changes nothing
        return mp.mpf(0)
    if shrinkage == "oas":
        square = mp.fsum(x * x for row in sigma for x in row) / h**2
        found = (square + mean**2) / ((n + 1) * (square - mean**2 / h))
    else:
        spread = mp.fsum((x * y - sigma[k][l]) ** 2 for row in f for k, x in enumerate(row) for l, y in enumerate(row))
        found = spread / n**2 / distance
    return min(found, 1 - mp.mpf(10) ** -12)


def _h(f: list, labels: list, a) -> mp.mpf:
    return _shrunk_h(f, labels, a) if a > 0 else _literal_h(f, labels)


def _shrunk_h(f: list, labels: list, a) -> mp.mpf:
    n, h, sigma = len(f), len(f[0]), _covariance(f)
    mean = mp.fsum(sigma[k][k] for k in range(h)) / h
    shrunk = mp.matrix([[(1 - a) * sigma[k][l] + (k == l) * a * mean for l in range(h)] for k in range(h)])
    factor, total = mp.cholesky(shrunk), mp.mpf(0)
    for c in set(labels):
        chosen = [row for row, label in zip(f, labels, strict=True) if label == c]
        mean_c = [mp.fsum(column) / len(chosen) for column in zip(*chosen, strict=True)]
        solved = []  # L⁻¹ μ_c
        for k in range(h):
            solved.append((mean_c[k] - mp.fdot([factor[k, l] for l in range(k)], solved)) / factor[k, k])
        total += mp.mpf(len(chosen)) / n * mp.fdot(solved, solved)
    return (1 - a) * total


def _literal_h(f: list, labels: list) -> mp.mpf:
    """‖Qᵀ Y‖² with an orthonormal Q of the columns of f and the classes' unit indicators Y: tr Σ⁺ Σ_between.

    What depends on other columns leaves 1e-45 of itself, what does not leaves 1e-16 in float32's worst case.
    """
    basis: list = []
    for column in zip(*f, strict=True):
        size, left = mp.sqrt(mp.fdot(column, column)), list(column)
        for _ in range(2):
            for q in basis:
                along = mp.fdot(q, left)
                left = [x - along * y for x, y in zip(left, q, strict=True)]
        norm = mp.sqrt(mp.fdot(left, left))
        if norm > size * mp.mpf(10) ** -25 and size > 0:
            basis.append([x / norm for x in left])
    return mp.fsum(
        mp.fsum(x for x, label in zip(q, labels, strict=True) if label == c) ** 2 / labels.count(c)
        for q in basis
        for c in set(labels)
    )


@cache
def reference_h(name, dtype, scale, shrinkage):
    """Intensity on the uniform mixture, H at WEIGHTS and its gradient, and H of the first prompt with its own."""
    with mp.workdps(DIGITS):
        features, labels = problem_of(name, dtype, scale)
        parts, labels = [_exact(f) for f in features], labels.tolist()
        a = _intensity(_mixed(parts, [mp.mpf(1) / len(parts)] * len(parts)), shrinkage)
        weights = [mp.mpf(w) for w in WEIGHTS]
        alone = _intensity(parts[0], shrinkage)
        return float(a), float(_h(_mixed(parts, weights), labels, a)), float(_h(parts[0], labels, alone))


def exact_h(features, labels, weights) -> float:
    """Eq. 5 to the letter."""
    with mp.workdps(DIGITS):
        mixed = _mixed([_exact(f) for f in features], [mp.mpf(float(w)) for w in weights])
        return float(_h(mixed, labels.tolist(), 0))


def reference_gradient(features, labels, a: float) -> np.ndarray:
    """Central differences over a step of 1e-12: exact to 1e-24."""
    with mp.workdps(DIGITS):
        parts, labels, step, slopes = [_exact(f) for f in features], labels.tolist(), mp.mpf(10) ** -12, []
        for i in range(len(parts)):
            ends = []
            for sign in (1, -1):
                weights = [mp.mpf(w) + sign * step * (k == i) for k, w in enumerate(WEIGHTS)]
                ends.append(_h(_mixed(parts, weights), labels, mp.mpf(a)))
            slopes.append(float((ends[0] - ends[1]) / (2 * step)))
        return np.array(slopes)
