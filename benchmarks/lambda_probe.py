"""Which λ gives the best features before any tuning: accuracy of a linear probe under mixtures of CLIP's real prompts.

    python benchmarks/lambda_probe.py features FEATURES --runs RUNS [--seeds 0 20]
    python benchmarks/lambda_probe.py prompts FEATURES --suite SUITE --load-clip WEIGHTS/load_clip.py --runs RUNS
    python benchmarks/lambda_probe.py report FEATURE_RUNS PROMPT_RUNS --out RESULT.json

FEATURES come from suite_features.py. `features`: a few classes of a task and a few images of each give α; the
probe is fitted on the same images under Σ α_i f_i, and tested on all others. `prompts`: the same of features under the
mixed prompt Σ α_i P_i itself, which the network has to see. The probe is linear discriminant analysis with shrinkage
0.3. Kept features have no gradients: their Gram matrix is the identity, close to which it was measured to be
(docs/choices.md). A line a run goes into RUNS; runs that are there are not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from suite_features import load_features
from torch import Tensor

from hgprompt import EnsembleStatistics, FrozenViT, PromptPool, encode
from hgprompt.data import load_task, make_loader
from hgprompt.files import write_text
from hgprompt.objective import HScore
from hgprompt.optimize import WeightProblem

TASKS = ("emoji", "stamps", "textile", "fontid", "clipart")
CHOSEN_ON = ("emoji", "stamps")
LAMBDAS = (0.0, 0.03, 0.1, 0.3, 1.0)
KINDS = ((2, 20), (4, 20), (10, 20), (10, 10))
"""Classes (as far as the task has them) and labelled images of each."""
SHRINKAGE = 0.3
TEST_IMAGES = 300


def probe(features: Tensor, labels: Tensor, unseen: Tensor, truth: Tensor) -> float:
    """Accuracy of LDA fitted on features [n, h] and labels [n], on unseen ones; solved in n dimensions (Woodbury)."""
    means = torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    centred = (features - means[labels]) * math.sqrt((1 - SHRINKAGE) / len(features))
    ridge = SHRINKAGE * float(centred.square().sum() / (1 - SHRINKAGE)) / features.shape[1]
    kernel = centred @ centred.T + ridge * torch.eye(len(centred), dtype=centred.dtype)
    weights = (means.T - centred.T @ torch.linalg.solve(kernel, centred @ means.T)) / ridge
    logits = unseen @ weights - (means.T * weights).sum(0) / 2
    return float((logits.argmax(1) == truth).double().mean())


def mixtures(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Weights [M] of everything compared, from labelled features [M, n, h]."""
    count = len(features)
    kept = EnsembleStatistics(folds=8, keep="features")
    kept.update(features.float(), labels)
    problem = WeightProblem(kept, torch.eye(count, dtype=torch.float64), starts=3)
    score = HScore(kept, shrinkage="auto")
    best = int(np.argmax([score(one)[0] for one in np.eye(count)]))
    found = {"uniform": torch.full((count,), 1 / count, dtype=torch.float64)}
    found |= {f"λ={lam:g}": problem.solve(lam).weights for lam in LAMBDAS}
    return found | {"best single": torch.eye(count, dtype=torch.float64)[best]}


def draw(labels: Tensor, classes: int, per_class: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images to learn from, all others, and the new numbers of the classes drawn."""
    generator = torch.Generator().manual_seed(1000 * seed + classes)
    known = labels.unique()
    known = known[torch.randperm(len(known), generator=generator)][:classes]
    learn, test = [], []
    for c in known.tolist():
        of_class = torch.nonzero(labels == c).flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        learn += of_class[:per_class].tolist()
        test += of_class[per_class:].tolist()
    learn = torch.tensor(learn)[torch.randperm(len(learn), generator=generator)]
    number = torch.full((int(labels.max()) + 1,), -1)
    number[known] = torch.arange(len(known))
    return learn, torch.tensor(test), number


def of_others(directory: Path, task: str) -> tuple[list[int], Tensor, Tensor]:
    """Places in the pool of the prompts of other tasks, their features (float64), labels."""
    names, features, labels = load_features(directory, task)
    others = [i for i, name in enumerate(names) if name != task]
    return others, features[others].double(), labels


def on_features(directory: Path, task: str, classes: int, per_class: int, seed: int) -> dict[str, Any]:
    _, features, labels = of_others(directory, task)
    learn, test, number = draw(labels, classes, per_class, seed)
    known, truth = number[labels[learn]], number[labels[test]]
    found = mixtures(features[:, learn], known)

    def accuracy(weights: Tensor) -> float:
        mixed = torch.tensordot(weights, features, dims=1)
        return probe(mixed[learn], known, mixed[test], truth)

    alone = [accuracy(one) for one in torch.eye(len(features), dtype=torch.float64)]
    return {
        "kind": [int(number.max()) + 1, per_class],
        "accuracy": {name: accuracy(w) for name, w in found.items()} | {"mean of singles": statistics.fmean(alone)},
        "l1_to_uniform": {name: float((w - 1 / len(w)).abs().sum()) for name, w in found.items()},
    }


class MixedPrompts:
    """Features of a task's images under any mixed prompt, image by image only once."""

    def __init__(self, vit: FrozenViT, pool: PromptPool, suite: Path, task: str, others: list[int], count: int) -> None:
        images = torch.cat([x for x, _ in make_loader(load_task(suite / task, "train800val200"), vit.image_size)])
        self._images = images[torch.randperm(count, generator=torch.Generator().manual_seed(0))]  # as suite_features
        self._vit, self._prompts = vit, pool.stack()[others].double()
        self._known: dict[bytes, dict[int, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def __call__(self, weights: Tensor, places: Tensor) -> Tensor:
        known = self._known[weights.numpy().tobytes()]
        mixed = torch.tensordot(weights, self._prompts, dims=1).to(self._vit.dtype)
        missing = [i for i in places.tolist() if i not in known]
        for part in torch.tensor(missing, dtype=torch.int64).split(16):
            features = encode(self._vit, mixed[None], self._images[part])[0].double()
            known.update(zip(part.tolist(), features, strict=True))
        return torch.stack([known[i] for i in places.tolist()])


def on_prompts(features: Tensor, labels: Tensor, mixed: MixedPrompts, seed: int) -> dict[str, Any]:
    learn, test, number = draw(labels, 10, 20, seed)
    test = test[torch.randperm(len(test), generator=torch.Generator().manual_seed(0))][:TEST_IMAGES]
    known, truth = number[labels[learn]], number[labels[test]]
    found = mixtures(features[:, learn], known)
    accuracy, blended = {}, {}
    for name in ("uniform", "λ=0.1", "best single"):
        weights = found[name]
        blend = torch.tensordot(weights, features, dims=1)
        blended[name] = probe(blend[learn], known, blend[test], truth)
        if name == "best single":  # its mixed prompt is the prompt
            accuracy[name] = blended[name]
        else:
            accuracy[name] = probe(mixed(weights, learn), known, mixed(weights, test), truth)
    return {"kind": [int(number.max()) + 1, 20], "accuracy": accuracy, "accuracy of mixed features": blended}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def keep(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record["task"], record["kind"], record["seed"], record["accuracy"], flush=True)


def plan(seeds: list[int]) -> Iterator[tuple[int, str, tuple[int, int]]]:
    for seed in range(*seeds):
        for classes, per_class in KINDS:
            yield from ((seed, task, (classes, per_class)) for task in TASKS)


def run_features(arguments: argparse.Namespace) -> None:
    done = {(r["seed"], r["task"], *r["kind"]) for r in lines(arguments.runs)}
    for seed, task, (classes, per_class) in plan(arguments.seeds):
        have = len(load_features(arguments.features, task)[2].unique())
        kind = (min(classes, have), per_class)
        if (seed, task, *kind) not in done:
            done.add((seed, task, *kind))
            record = on_features(arguments.features, task, *kind, seed)
            keep(arguments.runs, {"seed": seed, "task": task, **record})


def run_prompts(arguments: argparse.Namespace) -> None:
    from real_task import POOL, load_clip

    pool, vit = PromptPool.load(POOL), FrozenViT.from_timm(load_clip(arguments.load_clip, 112))
    done = {(r["seed"], r["task"]) for r in lines(arguments.runs)}
    for task in TASKS:
        others, features, labels = of_others(arguments.features, task)
        mixed = MixedPrompts(vit, pool, arguments.suite, task, others, len(labels))
        for seed in range(*arguments.seeds):
            if (seed, task) not in done:
                record = on_prompts(features, labels, mixed, seed)
                keep(arguments.runs, {"seed": seed, "task": task, **record})


def gains(runs: list[dict[str, Any]], field: str = "accuracy") -> dict[str, Any]:
    """Points over uniform: for every task, and the mean over tasks ± standard error (over seeds, tasks fixed)."""
    table = {}
    for name in runs[0][field]:
        by_task = defaultdict(list)
        for run in runs:
            by_task[run["task"]].append(100 * (run[field][name] - run[field]["uniform"]))
        variance = sum(statistics.variance(d) / len(d) for d in by_task.values() if len(d) > 1)
        table[name] = {
            "mean": statistics.fmean(statistics.fmean(d) for d in by_task.values()),
            "standard_error": math.sqrt(variance) / len(by_task),
            "tasks": {task: statistics.fmean(d) for task, d in by_task.items()},
        }
    return table


def report(arguments: argparse.Namespace) -> None:
    features, prompts = lines(arguments.feature_runs), lines(arguments.prompt_runs)
    parts = {
        "chosen on": [r for r in features if r["task"] in CHOSEN_ON],
        "confirmed on": [r for r in features if r["task"] not in CHOSEN_ON],
    }
    record: dict[str, Any] = {
        "command": "python benchmarks/lambda_probe.py", "torch": torch.__version__, "shrinkage of the probe": SHRINKAGE,
        "features": {name: gains(runs) for name, runs in parts.items()},
        "by kind": {f"{k} images a class, C={c}": gains([r for r in features if r["kind"] == [c, k]])
                    for c, k in sorted({tuple(r["kind"]) for r in features})},
        "runs": {"features": features, "prompts": prompts},
    }  # fmt: skip
    if prompts:
        record["prompts"] = {"prompts": gains(prompts), "features": gains(prompts, "accuracy of mixed features")}
    write_text(arguments.out, json.dumps(_rounded(record), ensure_ascii=False) + "\n")
    for title, table in (*record["features"].items(), *record.get("prompts", {}).items()):
        print(title)
        for name, row in table.items():
            tasks = "  ".join(f"{task} {gain:+.2f}" for task, gain in row["tasks"].items())
            print(f"  {name:16s} {row['mean']:+.2f} ± {row['standard_error']:.2f}   {tasks}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("features", run_features), ("prompts", run_prompts)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("features", type=Path)
        command.add_argument("--runs", type=Path, required=True)
        command.add_argument("--seeds", type=int, nargs=2, default=[0, 20])
        if name == "prompts":
            command.add_argument("--suite", type=Path, required=True)
            command.add_argument("--load-clip", type=Path, required=True)
    command = commands.add_parser("report")
    command.set_defaults(function=report)
    command.add_argument("feature_runs", type=Path)
    command.add_argument("prompt_runs", type=Path)
    command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
