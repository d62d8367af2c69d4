"""Fig. 5: what a prompt does to the features of images of a task it has not seen, laid out in the plane by t-SNE."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgprompt.encoder import encode
from hgprompt.errors import OptionError
from hgprompt.objective import HScore
from hgprompt.paper.cells import Cell, Work
from hgprompt.paper.lab import Lab
from hgprompt.statistics import EnsembleStatistics
from hgprompt.tuning.methods import HGPrompt

MAX_POINTS = 1000
NEIGHBOURS = 5


def require_tsne() -> None:
    """OptionError where scikit-learn, which computes t-SNE, is not installed: before the work, and not after it."""
    if importlib.util.find_spec("sklearn") is None:
        raise OptionError("fig5 takes t-SNE from scikit-learn, which is not installed: pip install 'hgprompt[paper]'")


def embedding_cell(lab: Lab, target: str, sources: Sequence[str]) -> Cell:
    """The cell that holds a panel for each source prompt and one for the HGPrompt mixture of them all.

    Its record: panels {title: {points [N][2], h_score, neighbours}}, labels [N], weights {source: α}. h_score (at
    one intensity for all) and neighbours (accuracy of the 5 nearest neighbours, leave-one-out) are of the features
    themselves: t-SNE is a picture.
    """
    options = {
        "sources": list(sources), "pool": lab.pool_identity(sources), "lam": lab.plan.lam, "points": MAX_POINTS,
        "test_limit": lab.plan.test_limit, "seed": lab.plan.seeds[0], "revision": [HGPrompt.revision, 1],
    }  # fmt: skip
    name = lab.task(target).name
    return Cell(f"embedding.{name}", lab.identity(target, **options), lambda w: _embed(lab, name, sources, w))


def _embed(lab: Lab, target: str, sources: Sequence[str], work: Work) -> dict[str, Any]:
    loaded, seed = lab.load(target, work.report), lab.plan.seeds[0]
    work.report("mixing", 0, None)
    mixed, _, about = HGPrompt(lab.plan.lam).start(lab.setting(loaded.train800val200, sources), seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(loaded.test), generator=generator)[:MAX_POINTS].sort().values
    pairs = [loaded.test[i] for i in chosen.tolist()]
    images, labels = torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])
    prompts = torch.cat([lab.pool(sources).stack(), mixed[None]])
    with torch.no_grad():
        parts = []
        for start in range(0, len(images), 64):
            parts.append(encode(lab.backbone, prompts, images[start : start + 64]).double().cpu())
            work.report("features", start, len(images))
        features = torch.cat(parts, dim=1)
    # One intensity for all: else it is the shrinkage that is compared.
    together = EnsembleStatistics()
    together.update(features, labels)
    score = HScore(together)
    panels = {}
    for k, title in enumerate([*(f"source {s}" for s in sources), HGPrompt.name]):
        work.report(f"t-SNE, {title}", 0, None)
        panels[title] = {
            "points": _tsne(features[k], seed),
            "h_score": score(np.eye(len(features))[k])[0],
            "neighbours": neighbour_accuracy(features[k], labels, NEIGHBOURS),
        }
    return {"panels": panels, "labels": labels.tolist(), "weights": about["weights"]}


def neighbour_accuracy(features: Tensor, labels: Tensor, k: int) -> float:
    """Share of points [N, h] whose label most of the k points nearest to them have; ties: the smaller label."""
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(float("inf"))
    votes = torch.nn.functional.one_hot(labels[distances.topk(min(k, len(labels) - 1), largest=False).indices])
    return float((votes.sum(1).argmax(1) == labels).double().mean())


def _tsne(features: Tensor, seed: int) -> list[list[float]]:
    """[N, h] → [N][2]."""
    require_tsne()
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    points = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(features.numpy())
    return [[round(float(x), 4) for x in point] for point in points]
