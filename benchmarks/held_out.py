"""Does a pool of source prompts help on a task that it does not know? The tables of docs/results.md.

    python benchmarks/held_out.py --suite SUITE --out benchmarks/results/held-out.json [--targets emoji azimuth]
    python benchmarks/held_out.py --out benchmarks/results/held-out.json --table

One prompt is tuned for each task (the folders of SUITE in VTAB-1k layout, and the procedural tasks). Each target then
meets the prompts of all other tasks: `compare_starts` at several budgets and seeds. Every seed draws its own training
images of the target; the test images are the same. Interrupted, the same command goes on where it was; several
processes with --targets of their own and one thread each share the work better than one process with several threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from pathlib import Path

import torch
from scipy.stats import t as student_t

from hgprompt import FrozenViT, PromptPool, load_backbone
from hgprompt.bundled import fast_dtype
from hgprompt.data import PROCEDURAL_TASKS, LabelledImages, decode, load_task, render_task
from hgprompt.data.folders import balanced
from hgprompt.files import write_text
from hgprompt.strict_json import jsonable
from hgprompt.tuning import TuneConfig, compare_starts, random_prompt, tune

TARGETS = (
    "emoji", "object-count", "stamps", "nearest-distance", "fontid", "sprite-orientation", "letters", "clipart",
)  # fmt: skip
SEEDS = (43, 44, 82)  # 42, the config's, is that of the sources' random start
BUDGETS = (2, 10, 30)
NUM_TOKENS = 10
SOURCE_IMAGES, SOURCE_EPOCHS = 400, 15
IMAGES, TEST_IMAGES = 100, 300
PAIRS = (
    ("uniform", "random"), ("HGPrompt", "random"), ("HGPrompt", "uniform"), ("HGPrompt λ=0", "uniform"),
    ("HGPrompt λ=0", "best single by H"), ("HGPrompt", "best single by H"),
)  # fmt: skip
CONFIG = TuneConfig(batch_size=32, optimizer="adamw", lr=0.16, head_lr=0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the pool and checkpoints; default: beside --out")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.table:
        work = args.work or args.out.with_suffix("")
        work.mkdir(parents=True, exist_ok=True)
        measure(args.suite, args.targets, work)
        gather(work, args.out)
    print(tables(without_the_sources_seed(json.loads(args.out.read_text()))))


def measure(suite: Path, targets: list[str], work: Path) -> None:
    """Tune the sources and then each target from all starts; a file for every target."""
    vit = load_backbone("mini", dtype=fast_dtype("cpu"), device="cpu")
    folders = sorted(p for p in suite.iterdir() if (p / "train800val200.txt").is_file())
    pool = sources(vit, folders, work)
    for target in targets:
        done = work / f"{target}.json"
        if done.is_file():
            continue
        folder = next((f for f in folders if f.name == target), None)
        comparison = compare_starts(
            vit, pool.without(target), lambda seed, t=target, f=folder: _training(t, f, vit, IMAGES, seed),
            _test(target, folder, vit), seeds=SEEDS, epochs=BUDGETS, config=CONFIG, evaluate_every=10, variants=(0.0,),
            folder=work,
        )  # fmt: skip
        record = {"settings": _settings(vit), "pool": pool.metadata, "result": jsonable(comparison.record())}
        write_text(done, json.dumps(record, allow_nan=False) + "\n")
        print(target, comparison.accuracy.mean(1).tolist(), flush=True)


def gather(work: Path, out: Path) -> None:
    """One record of all targets that are done."""
    parts = {t: json.loads((work / f"{t}.json").read_text()) for t in TARGETS if (work / f"{t}.json").is_file()}
    first = next(iter(parts.values()))
    record = {k: first[k] for k in ("settings", "pool")} | {"targets": {t: p["result"] for t, p in parts.items()}}
    write_text(out, json.dumps(record, indent=1) + "\n")


def sources(vit: FrozenViT, folders: list[Path], work: Path) -> PromptPool:
    """A prompt for every task, all from one random start."""
    path = work / "pool.safetensors"
    pool = PromptPool.load(path) if path.is_file() else None
    config = dataclasses.replace(CONFIG, epochs=SOURCE_EPOCHS)
    start = random_prompt(vit, NUM_TOKENS, seed=config.seed)
    places: dict[str, Path | None] = {f.name: f for f in folders} | dict.fromkeys(PROCEDURAL_TASKS)
    for name, folder in places.items():
        if pool is not None and name in pool:
            continue
        images = _training(name, folder, vit, SOURCE_IMAGES, config.seed)
        tuned = tune(vit, {name: start}, images, config=config)
        learned = tuned.history[-1]["train_accuracy"][0]
        metadata = {name: {"init_seed": config.seed, "images": len(images), "train_accuracy": learned}}
        fresh = PromptPool({name: tuned.prompt(name)}, backbone=vit.info, metadata=metadata)
        pool = fresh if pool is None else pool.merge(fresh)
        pool.save(path)
        print(metadata, flush=True)
    assert pool is not None
    return pool


def _training(name: str, folder: Path | None, vit: FrozenViT, count: int, seed: int) -> LabelledImages:
    if folder is None:
        return render_task(name, count, image_size=vit.image_size[0], seed=seed)
    return decode(load_task(folder, "train800val200"), vit.image_size, limit=count, seed=seed)


def _test(name: str, folder: Path | None, vit: FrozenViT) -> LabelledImages:
    if folder is None:
        return render_task(name, TEST_IMAGES, image_size=vit.image_size[0], split="test")
    task = load_task(folder, "test")
    chosen = balanced(task.samples, min(TEST_IMAGES, len(task.samples)), 0)
    return decode(dataclasses.replace(task, samples=chosen), vit.image_size)


def _settings(vit: FrozenViT) -> dict[str, object]:
    return {
        "backbone": vit.name, "fingerprint": vit.fingerprint, "dtype": str(vit.dtype), "num_tokens": NUM_TOKENS,
        "source_images": SOURCE_IMAGES, "source_epochs": SOURCE_EPOCHS, "images": IMAGES, "test_images": TEST_IMAGES,
        "config": dataclasses.asdict(CONFIG), "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def without_the_sources_seed(record: dict) -> dict:
    """Runs of the seed that the sources began with, which files of before have, are left out: their random start is the
    sources' own."""
    own = record["settings"]["config"]["seed"]
    for result in record["targets"].values():
        kept = [s for s, seed in enumerate(result["seeds"]) if seed != own]
        result["seeds"] = [result["seeds"][s] for s in kept]
        result["accuracy"] = [[budget[s] for s in kept] for budget in result["accuracy"]]
    return record


def tables(record: dict) -> str:
    """Markdown: one table per budget, mean ± standard deviation over the seeds, and paired differences of starts."""
    lines = []
    first = next(iter(record["targets"].values()))
    starts, budgets = first["starts"], first["epochs"]
    for e, budget in enumerate(budgets):
        lines += [f"\n### {budget} epochs\n", "| target | " + " | ".join(starts) + " |", "|---|" + "---|" * len(starts)]
        means: list[list[float]] = []
        for target, result in record["targets"].items():
            columns = list(zip(*result["accuracy"][e], strict=True))
            means.append([statistics.mean(column) for column in columns])
            best = max(means[-1])
            cells = [
                f"{'**' if m == best else ''}{100 * m:.1f}{'**' if m == best else ''} ± {100 * statistics.stdev(c):.1f}"
                for m, c in zip(means[-1], columns, strict=True)
            ]
            lines.append(f"| {target} | " + " | ".join(cells) + " |")
        average = [statistics.mean(column) for column in zip(*means, strict=True)]
        lines.append("| mean | " + " | ".join(f"{100 * m:.1f}" for m in average) + " |")
    lines += ["\n### Paired differences\n", "| | " + " | ".join(f"{b} epochs" for b in budgets) + " |"]
    lines.append("|---|" + "---|" * len(budgets))
    for one, other in PAIRS:
        cells = [_paired(record, e, starts.index(one), starts.index(other)) for e in range(len(budgets))]
        lines.append(f"| {one} − {other} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paired(record: dict, budget: int, one: int, other: int) -> str:
    """Mean difference over targets with its 95 % interval (Student's t; a target's mean over seeds is one observation),
    and in how many of all runs `one` was ahead."""
    runs = [[seed[one] - seed[other] for seed in r["accuracy"][budget]] for r in record["targets"].values()]
    means = [100 * statistics.mean(run) for run in runs]
    half = float(student_t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / len(means) ** 0.5
    ahead, ties = (sum(test(d) for run in runs for d in run) for test in (lambda d: d > 0, lambda d: d == 0))
    return f"{statistics.mean(means):+.1f} ± {half:.1f} ({ahead} of {sum(map(len, runs))} ahead, {ties} ties)"


if __name__ == "__main__":
    main()
