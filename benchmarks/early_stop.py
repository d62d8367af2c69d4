"""Does the stop rule keep its word? Stated errors of α against true distances on real tasks.

    python benchmarks/suite_features.py ... --out FEATURES
    python benchmarks/early_stop.py FEATURES --out benchmarks/results/early-stop-2026-11.json

Every repetition shuffles the images of a task, feeds them in batches of 16 into statistics, and looks at α whenever
`StopRule` asks to, as `fast_ensemble` does (the seven prompts of the other tasks, eight folds). There is no network and
so no gradient here: where λ > 0, the Gram matrix is the identity, which that of real prompts is close to. When the rule
looks does not depend on the tolerance, so one pass to the end tells where each tolerance would have stopped.

The stated error is a bound on ‖α_n - α_∞‖₁, which nobody knows. Beside it stand two distances: from α_n to α_N of
all N images, and that distance over √(1 - n/N). The images of α_n are among those of α_N, and were α_n a mean, the
variance of α_n - α_N would be 1 - n/N of that of α_n - α_∞: the second figure undoes this, roughly, and is the one to
judge by.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median

import torch
from suite_features import load_features

from hgprompt import stopping
from hgprompt.optimize import WeightProblem
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import StopRule

TASKS = ("emoji", "textile", "fontid", "clipart", "stamps")
TOLERANCES = (0.1, 0.2, 0.3, 0.5)
LAMS = (0.0, 0.1, 1.0)
FOLDS, BATCH, CONFIDENCE = 8, 16, 0.9


def answer(statistics: EnsembleStatistics, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """α [M] of the images so far, and α without each fold [K, M]; with the options of `fast_ensemble`."""
    gram = torch.eye(statistics.num_prompts, dtype=torch.float64) if lam else None
    problem = WeightProblem(statistics, gram)
    solution = problem.solve(lam)
    return solution.weights, problem.jackknife(solution, None if gram is None else [gram] * FOLDS, lam)


def whole(features: torch.Tensor, labels: torch.Tensor, lam: float) -> torch.Tensor:
    """α [M] of all images."""
    statistics = EnsembleStatistics(folds=FOLDS)
    statistics.update(features, labels)
    return answer(statistics, lam)[0]


def others(directory: Path, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, N, h] under the prompts of the other tasks, and labels [N]."""
    names, features, labels = load_features(directory, task)
    return features[[i for i, name in enumerate(names) if name != task]], labels


def repetition(features: torch.Tensor, labels: torch.Tensor, lam: float, seed: int) -> list[dict]:
    """What every look of one shuffled stream saw: images, α, α without each fold, seconds."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    statistics, looks = EnsembleStatistics(folds=FOLDS), []
    rule = StopRule(1e-12, FOLDS)  # only to say when to look: the stream is read to its end
    for chosen in order.split(BATCH):
        statistics.update(features[:, chosen], labels[chosen])
        if not rule.due(labels[chosen]) or not 2 <= len(statistics.classes) < statistics.num_images:
            continue
        start = time.perf_counter()
        weights, without_fold = answer(statistics, lam)
        seconds = time.perf_counter() - start
        looks.append(
            {"images": rule.num_images, "weights": weights.tolist(), "without_fold": without_fold.tolist(),
             "seconds": seconds}
        )  # fmt: skip
    return looks


def stated(looks: list[dict]) -> list[dict]:
    """The looks with the error that the rule states at each."""
    rule, rows = StopRule(1e-12, FOLDS), []
    for look in looks:
        rule.num_images = look["images"]
        rule.look(*(torch.tensor(look[key], dtype=torch.float64) for key in ("weights", "without_fold")))
        rows.append({**look, "stated": rule.error})
    return rows


def distances(looks: list[dict], full: torch.Tensor, total: int) -> list[dict]:
    """Looks with their distance to α of all images, as it is and for the images that both share."""
    rows = []
    for look in stated(looks):
        found = float((torch.tensor(look["weights"], dtype=torch.float64) - full).abs().sum())
        shared = (1 - look["images"] / total) ** 0.5
        rows.append({**look, "distance": found, "corrected": min(found / shared, 2.0) if shared else 0.0})
    return rows


def stop(looks: list[dict], tolerance: float) -> dict | None:
    """The look at which a tolerance stops the stream; None: it is read to its end."""
    return next((look for look in looks if look["stated"] <= tolerance), None)


def coverage(rows: list[dict], key: str) -> float | None:
    """Share of looks whose stated error is at least the distance; None where there is none."""
    return sum(r["stated"] >= r[key] for r in rows) / len(rows) if rows else None


def summary(runs: list[dict], total: dict[str, int], full: dict[str, dict[str, torch.Tensor]]) -> list[dict]:
    """One line for every λ of the runs: coverage at all looks that have a bound, and at the stops of each tolerance."""
    lines = []
    for lam in sorted({run["lam"] for run in runs}):
        measured = [
            (run["task"], distances(run["looks"], full[run["task"]][str(lam)], total[run["task"]]))
            for run in runs
            if run["lam"] == lam
        ]
        every = [r for _, rows in measured for r in rows if math.isfinite(r["stated"])]
        stops = {}
        for tolerance in TOLERANCES:
            found = [(task, stop(rows, tolerance)) for task, rows in measured]
            stopped = [r for _, r in found if r is not None]
            shares = [1 - r["images"] / total[task] if r is not None else 0.0 for task, r in found]
            within = [r["corrected"] <= tolerance for r in stopped]
            stops[str(tolerance)] = {
                "streams": len(found), "stopped": len(stopped), "saved": mean(shares),
                "coverage": coverage(stopped, "distance"), "coverage_corrected": coverage(stopped, "corrected"),
                "within_tolerance_corrected": mean(within) if within else None,
                "stated": median(r["stated"] for r in stopped) if stopped else None,
                "corrected": median(r["corrected"] for r in stopped) if stopped else None,
            }  # fmt: skip
        lines.append(
            {"lam": lam, "looks": len(every), "coverage": coverage(every, "distance"),
             "coverage_corrected": coverage(every, "corrected"),
             "median_stated": median(r["stated"] for r in every) if every else None,
             "median_corrected": median(r["corrected"] for r in every) if every else None, "stops": stops}
        )  # fmt: skip
    return lines


def single_look(runs: list[dict], total: dict[str, int], full: dict[str, dict[str, torch.Tensor]]) -> list[dict]:
    """The summary of a rule that believes one look, for comparison."""
    was = stopping.LOOKS, stopping.FACTOR
    stopping.LOOKS, stopping.FACTOR = 1, 1.0
    try:
        return summary(runs, total, full)
    finally:
        stopping.LOOKS, stopping.FACTOR = was


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 20), metavar=("FIRST", "END"), help="END excluded")
    parser.add_argument("--lams", nargs="+", type=float, default=LAMS)
    parser.add_argument("--runs", type=Path, default=Path("early-stop.jsonl"), help="a line per stream; taken up again")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seeds, lams = range(*arguments.seeds), arguments.lams
    lines = arguments.runs.read_text().splitlines() if arguments.runs.exists() else []
    runs = [run for run in map(json.loads, lines) if run["lam"] in lams and run["seed"] in seeds]
    known = {(run["lam"], run["task"], run["seed"]) for run in runs}
    total, full = {}, {}
    data = {task: others(arguments.features, task) for task in TASKS}
    for task, (features, labels) in data.items():
        total[task] = len(labels)
        full[task] = {str(lam): whole(features, labels, lam) for lam in lams}
    for seed in seeds:
        for task, (features, labels) in data.items():
            for lam in lams:
                if (lam, task, seed) in known:
                    continue
                runs.append({"lam": lam, "task": task, "seed": seed, "looks": repetition(features, labels, lam, seed)})
                with arguments.runs.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
    alone = single_look(runs, total, full)
    found = summary(runs, total, full)
    for line in found:
        print(json.dumps(line, indent=1))
    if arguments.out:
        record = {
            "torch": version("torch"), "images": total, "confidence": CONFIDENCE, "folds": FOLDS, "batch": BATCH,
            "streams": {f"{task} λ={lam}": sum(r["task"] == task and r["lam"] == lam for r in runs)
                        for task in TASKS for lam in lams},
            "full_weights": {task: {lam: w.tolist() for lam, w in by.items()} for task, by in full.items()},
            "summary": found,
            "single_look": alone,
            "looks": [
                {**{k: run[k] for k in ("lam", "task", "seed")}, "images": r["images"],
                 **{k: round(r[k], 4) if math.isfinite(r[k]) else None for k in ("stated", "distance", "corrected")}}
                for run in runs
                for r in distances(run["looks"], full[run["task"]][str(run["lam"])], total[run["task"]])
            ],
        }  # fmt: skip
        arguments.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
