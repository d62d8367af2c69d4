"""Choosing 13 of 256 prompts: successive halving beside greedy selection and ranking on all images.

    python benchmarks/suite_features.py ... --out FEATURES
    python benchmarks/selection.py FEATURES --tasks emoji textile --out benchmarks/results/selection-budget-2026-11.json

Pools are made from the features of real prompts on a real task. Each of the 256 prompts starts from a real one and
takes a third of its image-specific part from other images. `GOOD` of them tell a random third of the classes from each
other and from the rest, so that it takes several to tell them all; the others keep a tenth of the class structure at
most. What is measured: the share of images × prompts spent; the regret, by how much the objective of the set found is
above that of greedy selection on everything, relative to it; the same of all ways against the best of them, ranking by
H alone and random sets included; and how many of the prompts known to be good are left. An objective is the best that
eight starts over the set find, and for halving and greedy selection the weights that these found.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from suite_features import load_features

import hgprompt
from hgprompt.selection import SuccessiveHalving, greedy_selection, mixture_of
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


def run(features: torch.Tensor, labels: torch.Tensor, seed: int) -> dict[str, Any]:
    pool, good = make_pool(features, labels, seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
    pool, labels = pool[:, order], labels[order]
    start = time.perf_counter()
    halving = SuccessiveHalving(POOL, SIZE, len(labels))
    for at in range(0, len(labels), BATCH):
        batch = slice(at, at + BATCH)
        halving.update(pool[halving.survivors, batch], labels[batch])
    found = halving.finish()
    seconds = time.perf_counter() - start
    everything = EnsembleStatistics(keep="features")
    everything.update(pool, labels)
    start = time.perf_counter()
    full = greedy_selection(everything, SIZE)
    greedy_seconds = time.perf_counter() - start
    ranked = full.alone.argsort(descending=True, stable=True)[:SIZE].tolist()
    random = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))[:SIZE].tolist()

    def objective(prompts: list[int], *warm: torch.Tensor) -> float:
        return mixture_of(everything, prompts, intensity=full.intensity, warm=warm).diagnostics.objective

    sets = {"halving": found.order[:SIZE].tolist(), "greedy": full.order[:SIZE].tolist()}
    values = {
        "halving": objective(sets["halving"], found.weights),
        "greedy": full.objective,
        "ranking": objective(ranked),
        "random": objective(random),
    }
    best = min(values.values())
    return {
        "share": halving.pairs / (POOL * len(labels)),
        "objectives": values,
        "regret": 1 - values["halving"] / values["greedy"],
        "regret_to_best": {name: 1 - value / best for name, value in values.items()},
        "good": {name: len(good & set(prompts)) for name, prompts in sets.items()},
        "good_finalists": len(good & set(halving.survivors.tolist())),
        "set": sets["halving"],
        "seconds": seconds,
        "seconds_greedy": greedy_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, SEEDS), metavar=("FIRST", "END"), help="END excluded")
    parser.add_argument("--runs", type=Path, help="a line per run; taken up again, and shared by several processes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    runs = arguments.runs or Path("selection.jsonl")
    for task in arguments.tasks:
        _, features, labels = load_features(arguments.features, task)
        for seed in range(*arguments.seeds):
            if (task, seed) in {(row["task"], row["seed"]) for row in _lines(runs)}:
                continue
            row = {"task": task, "seed": seed, "images": len(labels), **run(features, labels, seed)}
            with runs.open("a") as file:
                file.write(json.dumps(row) + "\n")
    rows = [r for r in _lines(runs) if r["task"] in arguments.tasks and r["seed"] in range(*arguments.seeds)]
    for task in arguments.tasks:
        regrets = [r["regret"] for r in rows if r["task"] == task]
        within = sum(r <= 0.01 for r in regrets)
        print(
            f"{task}: {within} of {len(regrets)} within 1 %, median {statistics.median(regrets):.4f}, "
            f"worst {max(regrets):.4f}"
        )
    if arguments.out:
        record = {
            "pool": POOL, "size": SIZE, "good": GOOD, "batch": BATCH, "torch": torch.__version__,
            "hgprompt": hgprompt.__version__, "runs": sorted(rows, key=lambda r: (r["task"], r["seed"])),
        }  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def _lines(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []


if __name__ == "__main__":
    main()
