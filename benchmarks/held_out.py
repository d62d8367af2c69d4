"""Does a pool of source prompts help on a task that it does not know? The tables of docs/results.md.

    python benchmarks/held_out.py --suite SUITE --out benchmarks/results/held-out.json
    python benchmarks/held_out.py --out benchmarks/results/held-out.json --table

One prompt is tuned for each task (the folders of SUITE in VTAB-1k layout, and the procedural tasks). Each target then
meets the prompts of all other tasks: `compare_starts` at several budgets and seeds. Every seed draws its own training
images of the target; the test images are the same. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
from pathlib import Path

import torch

from hgprompt import FrozenViT, PromptPool, load_backbone
from hgprompt.bundled import fast_dtype
from hgprompt.data import PROCEDURAL_TASKS, LabelledImages, decode, load_task, render_task
from hgprompt.data.folders import balanced
from hgprompt.files import write_text
from hgprompt.tuning import TuneConfig, compare_starts, random_prompt, tune

TARGETS = (
    "emoji", "object-count", "stamps", "nearest-distance", "fontid", "sprite-orientation", "letters", "clipart",
)  # fmt: skip
SEEDS = (42, 44, 82)
BUDGETS = (2, 10, 50)
NUM_TOKENS = 10
SOURCE_IMAGES, SOURCE_EPOCHS = 400, 15
IMAGES, TEST_IMAGES = 160, 300
CONFIG = TuneConfig(batch_size=32, optimizer="adamw", lr=0.16, head_lr=0.04)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for the pool and checkpoints; default: beside --out")
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    args = parser.parse_args()
    if not args.table:
        work = args.work or args.out.with_suffix("")
        work.mkdir(parents=True, exist_ok=True)
        measure(args.suite, args.out, work)
    print(tables(json.loads(args.out.read_text())))


def measure(suite: Path, out: Path, work: Path) -> None:
    vit = load_backbone("mini", dtype=fast_dtype("cpu"), device="cpu")
    folders = sorted(p for p in suite.iterdir() if (p / "train800val200.txt").is_file())
    pool = sources(vit, folders, work)
    record = json.loads(out.read_text()) if out.is_file() else {"settings": _settings(vit), "pool": pool.metadata}
    results = record.setdefault("targets", {})
    for target in TARGETS:
        if target in results:
            continue
        folder = next((f for f in folders if f.name == target), None)
        comparison = compare_starts(
            vit, pool.without(target), lambda seed, t=target, f=folder: _training(t, f, vit, IMAGES, seed),
            _test(target, folder, vit), seeds=SEEDS, epochs=BUDGETS, config=CONFIG, evaluate_every=10, variants=(0.0,),
            folder=work,
        )  # fmt: skip
        results[target] = comparison.record()
        write_text(out, json.dumps(record, indent=1) + "\n")
        print(target, comparison.accuracy.mean(1).tolist(), flush=True)


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
        metadata = {name: {"images": len(images), "train_accuracy": tuned.history[-1]["train_accuracy"][0]}}
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


def tables(record: dict) -> str:
    """Markdown: one table per budget, mean ± standard deviation over the seeds, and the paired differences."""
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
    return "\n".join(lines)


if __name__ == "__main__":
    main()
