"""What a start from other tasks' prompts is worth on a real CLIP ViT-B/16, by λ and with a fitted head.

    python benchmarks/clip_starts.py --suite SUITE --load-clip WEIGHTS/load_clip.py --out OUT --tasks emoji stamps

Each target meets the prompts of the seven other tasks (tests/assets/clip_suite_pool.safetensors), and is tuned from
every start at once, on the same images in the same order: AdamW at the rates of the sources, under fitted heads at an
eighth of them. Before any tuning, a closed-form head on the features under each start and each source is asked for its
cross-entropy on held-out images: by that the start could be chosen. One file for every task and seed; interrupted, the
same command goes on with the next that is not there. It is for one thread: with another number of threads mixtures
differ in their last bits, and a tuning that was begun is refused.

--untuned is of the fitted heads before any tuning alone, and of the starts that need no gradients: forward passes only.
--no-prompt is of such a head on the network's own features, without any prompt: what all starts are to be held against.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from real_task import POOL, load_clip

from hgprompt import EnsembleStatistics, FrozenViT, PromptPool, encode, fast_ensemble
from hgprompt.bundled import fast_dtype
from hgprompt.data import LabelledImages, decode, load_task
from hgprompt.data.folders import balanced
from hgprompt.files import make_directory, write_text
from hgprompt.optimize import WeightProblem
from hgprompt.sample import folds_of
from hgprompt.strict_json import jsonable
from hgprompt.task_loss import fit_heads, held_out_logits, inverse_temperatures
from hgprompt.tuning import TuneConfig, evaluate, fitted_head, random_prompt, tune

IMAGES, TEST_IMAGES, EPOCHS = 160, 200, 3
SEEDS = (43, 44, 82)  # 42 is the seed of the sources' random start
LAMBDAS = (1.0, 0.1, 0.0)
FOLDS = 8
CONFIG = TuneConfig(batch_size=32, optimizer="adamw", lr=0.16, head_lr=0.04, epochs=EPOCHS)
FITTED = replace(CONFIG, lr=0.02, head_lr=0.005)
"""At the rates of random heads fifteen steps leave a fitted head worse than it was."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--load-clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--untuned", action="store_true", help="fitted heads as they are, without gradients; own OUT")
    parser.add_argument("--no-prompt", action="store_true", help="fitted heads without a prompt; own OUT")
    parser.add_argument("--to", type=Path, help="gather all that OUT holds into one file of results")
    parser.add_argument("--device", default="", help="what it ran on, in words")
    args = parser.parse_args()
    vit = FrozenViT.from_timm(load_clip(args.load_clip, 112), dtype=fast_dtype("cpu"))
    for seed in args.seeds:
        for task in args.tasks:
            done = make_directory(args.out) / f"{task}-{seed}.json"
            if not done.exists():
                if args.no_prompt:
                    record = measure_plain(vit, args.suite / task, seed)
                elif args.untuned:
                    record = measure_untuned(vit, args.suite / task, seed)
                else:
                    record = measure(vit, args.suite / task, seed, args.out)
                write_text(done, json.dumps(jsonable(record), allow_nan=False) + "\n")
                print(task, seed, {k: round(v, 3) for k, v in record["accuracy"].items()}, flush=True)
    if args.to:
        runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-[0-9]*.json"))]
        about = {"backbone": "CLIP ViT-B/16, int8-dequantised, 112 pixels", "device": args.device}
        write_text(args.to, json.dumps(jsonable(about | {"runs": runs}), ensure_ascii=False, allow_nan=False) + "\n")
        print_table(runs)


def print_table(runs: list[dict]) -> None:
    """Accuracies in %, and how far each row is above the same head's uniform one: mean over the tasks ± its error."""
    tasks = sorted({run["task"] for run in runs})
    mean = statistics.fmean
    by_task = {
        name: [100 * mean(run["accuracy"][name] for run in runs if run["task"] == task) for task in tasks]
        for name in runs[0]["accuracy"]
    }
    print("| start |", " | ".join(tasks), "| mean | over uniform |")
    for name, found in by_task.items():
        head = name.partition(",")[1] + name.partition(",")[2]
        cells, over = " | ".join(f"{value:.1f}" for value in (*found, mean(found))), ""
        if f"uniform{head}" in by_task:
            gains = [a - b for a, b in zip(found, by_task[f"uniform{head}"], strict=True)]
            error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            over = f"{mean(gains):+.1f} ± {error:.1f}"
        print(f"| {name} | {cells} | {over} |")


def read(vit: FrozenViT, folder: Path, seed: int) -> tuple[PromptPool, LabelledImages, LabelledImages]:
    """The other tasks' prompts; the seed's training images; the test images."""
    images = decode(load_task(folder, "train800val200"), vit.image_size, limit=IMAGES, seed=seed)
    test = load_task(folder, "test")
    chosen = balanced(test.samples, min(TEST_IMAGES, len(test.samples)), 0)
    return PromptPool.load(POOL).without(folder.name), images, decode(replace(test, samples=chosen), vit.image_size)


def measure(vit: FrozenViT, folder: Path, seed: int, out: Path) -> dict:
    """One task and seed: accuracies after the last epoch, and the weights."""
    pool, images, tested = read(vit, folder, seed)
    began = time.perf_counter()
    ensemble = fast_ensemble(pool, images.batches(32), backbone=vit, seed=seed)
    seconds = {"ensemble": time.perf_counter() - began}
    features = features_under(vit, pool.stack(), images)
    weights = {"HGPrompt": ensemble.weights} | mixtures(features, images.labels, ensemble.gradient_cosines)
    single = ensemble.best_single
    starts = starts_of(vit, pool, single, weights, seed)
    before = features_under(vit, torch.stack(list(starts.values())), images)
    accuracy, more = accuracies(vit, starts, before, images, tested, seed, out / f"{folder.name}-{seed}")
    seconds |= more
    alone = {name: held_out(f, images.labels) for name, f in zip(pool, features, strict=True)}
    return {
        "task": folder.name, "seed": seed, "images": len(images), "test_images": len(tested), "best_single": single,
        "accuracy": accuracy, "weights": {k: dict(zip(pool, w.tolist(), strict=True)) for k, w in weights.items()},
        "h_score": ensemble.h_score, "source_h_scores": ensemble.source_h_scores.tolist(),
        "held_out": {name: held_out(f, images.labels) for name, f in zip(starts, before, strict=True)},
        "source_held_out": alone, "seconds": seconds, "config": asdict(CONFIG),
        "config_fitted": asdict(FITTED), "dtype": str(vit.dtype), "torch": torch.__version__,
    }  # fmt: skip


def measure_untuned(vit: FrozenViT, folder: Path, seed: int) -> dict:
    """One task and seed: accuracies of fitted heads on the features under starts that the H-score alone chooses."""
    pool, images, tested = read(vit, folder, seed)
    kept = EnsembleStatistics()
    kept.update(features_under(vit, pool.stack(), images), images.labels)
    problem = WeightProblem(kept)
    weights = problem.solve(0.0).weights
    single = pool.names[int(problem.source_h_scores.argmax())]
    starts = starts_of(vit, pool, single, {"HGPrompt λ=0": weights}, seed)
    before = features_under(vit, torch.stack(list(starts.values())), images)
    return {
        "task": folder.name, "seed": seed, "images": len(images), "test_images": len(tested), "best_single": single,
        "accuracy": untuned(vit, starts, before, images, tested),
        "weights": dict(zip(pool, weights.tolist(), strict=True)), "source_h_scores": problem.source_h_scores.tolist(),
        "dtype": str(vit.dtype), "torch": torch.__version__,
    }  # fmt: skip


def measure_plain(vit: FrozenViT, folder: Path, seed: int) -> dict:
    """One task and seed: accuracy of a fitted head on the features under no prompt."""
    _, images, tested = read(vit, folder, seed)
    starts = {"no prompt": torch.zeros(0, vit.width)}
    before = features_under(vit, torch.stack(list(starts.values())), images)
    return {
        "task": folder.name, "seed": seed, "images": len(images), "test_images": len(tested),
        "accuracy": untuned(vit, starts, before, images, tested), "dtype": str(vit.dtype), "torch": torch.__version__,
    }  # fmt: skip


def starts_of(
    vit: FrozenViT, pool: PromptPool, single: str, weights: dict[str, torch.Tensor], seed: int
) -> dict[str, torch.Tensor]:
    """Prompts to start from, by name; one for each of the weights."""
    return {
        "random": random_prompt(vit, pool.num_tokens, seed=seed),
        "best single by H": pool[single],
        "uniform": pool.stack().mean(0),
        **{name: torch.tensordot(w.float(), pool.stack(), dims=1) for name, w in weights.items()},
    }


def accuracies(
    vit: FrozenViT,
    starts: dict[str, torch.Tensor],
    features: torch.Tensor,
    images: LabelledImages,
    tested: LabelledImages,
    seed: int,
    out: Path,
) -> tuple[dict[str, float], dict[str, float]]:
    """On the test images: every start under a fitted head as it is, tuned, and tuned under a random head; seconds.

    features: [K, N, h] of the images under the starts.
    """
    accuracy = untuned(vit, starts, features, images, tested)
    seconds = {}
    for label, head, config in ((", fitted head", "fitted", FITTED), ("", "random", CONFIG)):
        tuned = tune(
            vit, starts, images, test=tested, config=replace(config, seed=seed), head=head,
            checkpoint=out.with_name(f"{out.name}-{head}.checkpoint.safetensors"),
        )  # fmt: skip
        seconds[head] = tuned.seconds
        found = tuned.history[-1]["test_accuracy"]
        accuracy |= {f"{name}{label}": value for name, value in zip(starts, found, strict=True)}
    return accuracy, seconds


def untuned(
    vit: FrozenViT,
    starts: dict[str, torch.Tensor],
    features: torch.Tensor,
    images: LabelledImages,
    tested: LabelledImages,
) -> dict[str, float]:
    """Accuracy of every start under a head fitted to the features [K, N, h] of the images."""
    heads = [fitted_head(f, images.labels, tested.num_classes) for f in features]
    weight, bias = (torch.stack(part) for part in zip(*heads, strict=True))
    found = evaluate(vit, torch.stack(list(starts.values())), weight, bias, tested).tolist()
    return {f"{name}, fitted head, not tuned": value for name, value in zip(starts, found, strict=True)}


@torch.no_grad()
def features_under(vit: FrozenViT, prompts: torch.Tensor, images: LabelledImages) -> torch.Tensor:
    """[M, N, h]."""
    return torch.cat([encode(vit, prompts, batch) for batch, _ in images.batches(32)], dim=1)


def held_out(features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Of shrunk LDA at its temperature on features [N, h]: accuracy and cross-entropy on the folds it has not seen."""
    order = labels.argsort(stable=True)  # side by side, the images of a class are dealt to all folds
    features, labels = features[order], labels[order]
    kept = EnsembleStatistics(folds=FOLDS)
    kept.update(features[None], labels)
    own = [torch.from_numpy(folds_of(np.arange(len(labels)), FOLDS)) == k for k in range(FOLDS)]
    heads = fit_heads("lda", kept, device=torch.device("cpu"))
    logits, targets = held_out_logits(heads, [features[None, k] for k in own], [labels[k] for k in own])
    sharpened = inverse_temperatures(logits, targets)[:, None, None] * logits
    return {
        "accuracy": float((logits[0].argmax(1) == targets).double().mean()),
        "loss": float(F.cross_entropy(sharpened[0], targets)),
    }


def mixtures(features: torch.Tensor, labels: torch.Tensor, gram: torch.Tensor) -> dict[str, torch.Tensor]:
    """α of the other λ, from the same gradients."""
    kept = EnsembleStatistics(folds=FOLDS)
    kept.update(features, labels)
    problem = WeightProblem(kept, gram)
    return {f"HGPrompt λ={lam:g}": s.weights for lam, s in zip(LAMBDAS[1:], problem.path(LAMBDAS)[1:], strict=True)}


if __name__ == "__main__":
    main()
