"""Random problems with a signal, for the tests of what comes after the network."""

from __future__ import annotations

import numpy as np
import torch

from hgprompt.objective import gram_of
from hgprompt.statistics import EnsembleStatistics


def data(n, m, h, c, seed=0, signal=0.7):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    labels[:c] = np.arange(c)
    features = rng.standard_normal((m, n, h)) + signal * rng.standard_normal((m, c, h))[:, labels]
    return torch.from_numpy(features), torch.from_numpy(labels)


def statistics_of(features, labels, keep="features", folds=1):
    statistics = EnsembleStatistics(keep=keep, folds=folds)
    statistics.update(features, labels)
    return statistics


def random_gram(m, seed=0, shared=1.0):
    rng = np.random.default_rng(seed)
    return gram_of(torch.from_numpy(rng.standard_normal((m, 30)) + shared * rng.standard_normal(30)))
