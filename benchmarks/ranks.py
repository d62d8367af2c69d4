"""How a pass scales over ranks, and what ranks hand to each other, beside what the formulas of docs/scaling.md say.

    python benchmarks/ranks.py benchmarks/results/ranks-2026-11.json

Ranks have one thread each, and are processes of one machine over gloo. Wall-clock seconds say something where nothing
else runs and there are as many cores as ranks; the largest processor time of a rank, which the efficiency is of, leaves
out waiting, for other ranks and for other programs alike. Volumes do not depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hgprompt
import hgprompt.ensemble
from hgprompt.data import render_task
from hgprompt.distributed import Ranks
from hgprompt.tuning import random_prompt

NUM_PROMPTS, NUM_TOKENS, FOLDS, SAMPLE, BATCH = 4, 10, 8, 64, 32
REPETITIONS = 3
CASES = {
    "features": {"keep": "features", "lam": 0.0, "gradient_images": 0},
    "moments": {"keep": "moments", "lam": 0.0, "gradient_images": 0},
    "features, gradients": {"keep": "features", "gradient_images": SAMPLE},
    "prompts": {"keep": "features", "shard": "prompts", "gradient_images": SAMPLE},
}


class _Counted(Ranks):
    """Remembers itself, so that what it handed over can be read."""

    last: _Counted

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        _Counted.last = self


def _pool(vit: hgprompt.FrozenViT) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    start = random_prompt(vit, NUM_TOKENS)
    return torch.stack([start + 0.3 * torch.randn(start.shape, generator=g) for _ in range(NUM_PROMPTS)])


def _rank(rank: int, world: int, num_images: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    hgprompt.ensemble.Ranks = _Counted
    vit = hgprompt.load_backbone("mini", device="cpu")
    prompts, images = _pool(vit), render_task("nearest-distance", num_images, image_size=64)
    found = {}
    for name in names:
        options = CASES[name]
        mine = images if options.get("shard") == "prompts" else images.subset(torch.arange(rank, num_images, world))
        seconds, cpu_seconds = [], []
        for repetition in range(REPETITIONS + 1):
            dist.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            hgprompt.fast_ensemble(
                prompts, mine.batches(BATCH), backbone=vit, process_group=dist.group.WORLD, folds=FOLDS, **options
            )
            cpu = time.process_time() - cpu_began
            dist.barrier()
            if repetition:  # the first warms up
                seconds.append(time.perf_counter() - began)
                cpu_seconds.append(cpu)
        found[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "handed": _Counted.last.handed}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, num_images: int, names: list[str]) -> dict[str, dict]:
    """By case: seconds of each repetition, processor seconds by rank and repetition, and bytes that all ranks together
    handed to collectives, by stage."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, num_images, names, folder), nprocs=world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    found = {}
    for name in names:
        stages = sorted({stage for rank in ranks for stage in rank[name]["handed"]})
        by_stage = {stage: sum(rank[name]["handed"].get(stage, 0) for rank in ranks) for stage in stages}
        cpu_seconds = [rank[name]["cpu_seconds"] for rank in ranks]
        found[name] = {"seconds": ranks[0][name]["seconds"], "cpu_seconds": cpu_seconds, "handed_bytes": by_stage}
    return found


def predicted(name: str, world: int, num_images: int, width: int, num_classes: int) -> dict[str, int]:
    """Bytes that all ranks together hand over, by stage, without the shapes and counts that travel beside: the model of
    docs/scaling.md, in float32 features."""
    m, h, n, w = NUM_PROMPTS, width, num_images, world
    bytes_of = {}
    if name == "moments":
        # Second moments, sums, third and fourth by fold; class sums and counts; every rank hands over a whole set.
        per_fold = 8 * (m * (m + 1) // 2 * h * h + m * h + h + 1) + 8 * num_classes * (m * h + 1)
        bytes_of["merging the statistics"] = w * FOLDS * per_fold
    elif name == "prompts":
        bytes_of["reading the images"] = 4 * n * m * h
    else:
        bytes_of["merging the statistics"] = n * (4 * m * h + 8 + 4)
    if "gradients" in name:
        bytes_of["adding up the gradients"] = 4 * w * FOLDS * m * NUM_TOKENS * h
    elif name == "prompts":
        bytes_of["adding up the gradients"] = 4 * FOLDS * m * NUM_TOKENS * h
    return bytes_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2], help="ranks to time")
    arguments = parser.parse_args()
    vit = hgprompt.load_backbone("mini", device="cpu")
    num_classes = render_task("nearest-distance", 32, image_size=64).num_classes
    runs = []
    for world in arguments.worlds:
        for name, found in measure(world, arguments.images, list(CASES)).items():
            model = predicted(name, world, arguments.images, vit.width, num_classes)
            runs.append(
                {
                    "case": name, "ranks": world, "images": arguments.images, "seconds": found["seconds"],
                    "cpu_seconds": found["cpu_seconds"],
                    "largest_cpu_seconds": max(statistics.median(rank) for rank in found["cpu_seconds"]),
                    "handed_bytes": found["handed_bytes"], "predicted_bytes": model,
                }
            )  # fmt: skip
            print(json.dumps(runs[-1]))
    one = {run["case"]: run["largest_cpu_seconds"] for run in runs if run["ranks"] == 1}
    for run in runs:
        if run["case"] in one:
            run["efficiency"] = one[run["case"]] / (run["ranks"] * run["largest_cpu_seconds"])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "what": "a pass of the mini backbone shared by ranks on one machine, one thread each",
        "prompts": NUM_PROMPTS, "tokens": NUM_TOKENS, "width": vit.width, "folds": FOLDS, "classes": num_classes,
        "gradient_images": SAMPLE, "batch": BATCH, "runs": runs, "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "timm": timm.__version__},
        "commit": commit,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
