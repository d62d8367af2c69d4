"""Choosing 13 of 256 prompts: successive halving beside greedy selection and ranking on all images.

    python benchmarks/suite_features.py ... --out FEATURES
    python benchmarks/selection.py FEATURES --tasks emoji textile --out benchmarks/results/selection-2026-11.json

Pools are made from the features of real prompts on a real task. Each of the 256 prompts starts from a real one and
takes a third of its image-specific part from other images. `GOOD` of them tell a random third of the classes from each
other and from the rest, so that it takes several to tell them all; the others keep a tenth of the class structure at
most. What is measured: the share of images × prompts spent, the regret (how far the objective of the set found is from
that of greedy selection on everything), and how many of the set are known to be good; beside ranking by H alone and
random sets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from suite_features import load_features

from hgprompt.selection import SuccessiveHalving, greedy_selection, ranking_by_h_score, regret_of
from hgprompt.statistics import EnsembleStatistics

POOL, SIZE, GOOD, SEEDS, BATCH = 256, 13, 24, 10, 20


def make_pool(features: torch.Tensor, labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, set[int]]:
    """Features [POOL, N, h] made of real ones [8, N, h], and which prompts are good."""
    g = torch.Generator().manual_seed(seed)
    classes = labels.unique()
    good = set(torch.randperm(POOL, generator=g)[:GOOD].tolist())
    pool = torch.empty(POOL, *features.shape[1:])
    for i in range(POOL):
        f = features[int(torch.randint(len(features), (), generator=g))]
        means = torch.stack([f[labels == c].mean(0) for c in classes])
        rest = f - means[torch.searchsorted(classes, labels)]
        if i in good:
            kept = 0.7 + 0.3 * float(torch.rand((), generator=g))
            alike = torch.randperm(len(classes), generator=g)[len(classes) // 3 :]
            means[alike] = means[alike].mean(0)
        else:
            kept = 0.1 * float(torch.rand((), generator=g))
        means = means.mean(0) + kept * (means - means.mean(0))
        other = rest[torch.randperm(len(rest), generator=g)]
        pool[i] = means[torch.searchsorted(classes, labels)] + 0.8 * rest + 0.6 * other
    return pool, good


def run(features: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, float]:
    pool, good = make_pool(features, labels, seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
    pool, labels = pool[:, order], labels[order]
    start = time.perf_counter()
    halving = SuccessiveHalving(POOL, SIZE, len(labels))
    for at in range(0, len(labels), BATCH):
        batch = slice(at, at + BATCH)
        halving.update(pool[halving.survivors, batch], labels[batch])
    found = halving.finish().order[:SIZE].tolist()
    seconds = time.perf_counter() - start
    everything = EnsembleStatistics(keep="features")
    everything.update(pool, labels)
    start = time.perf_counter()
    best = greedy_selection(everything, SIZE)
    greedy_seconds = time.perf_counter() - start
    ranked = ranking_by_h_score(everything, SIZE).order[:SIZE].tolist()
    random = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:SIZE].tolist()
    return {
        "share": halving.pairs / (POOL * len(labels)),
        "regret": regret_of(everything, found, best),
        "regret_ranking": regret_of(everything, ranked, best),
        "regret_random": regret_of(everything, random, best),
        "good": len(good & set(found)),
        "good_greedy": len(good & set(best.order[:SIZE].tolist())),
        "good_ranking": len(good & set(ranked)),
        "seconds": seconds,
        "seconds_greedy": greedy_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record: dict = {"pool": POOL, "size": SIZE, "good": GOOD, "torch": torch.__version__, "tasks": {}}
    for task in arguments.tasks:
        _, features, labels = load_features(arguments.features, task)
        rows = []
        for seed in range(arguments.seeds):
            rows.append(run(features, labels, seed))
            print(task, seed, {k: round(v, 4) for k, v in rows[-1].items()}, flush=True)
        worst = max(row["regret"] for row in rows)
        record["tasks"][task] = {"images": len(labels), "runs": rows, "worst_regret": worst}
        print(f"{task}: regret median {statistics.median(r['regret'] for r in rows):.4f}, worst {worst:.4f}")
        if arguments.out:
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
