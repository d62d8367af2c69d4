"""Features of real tasks under every prompt of the CLIP pool, kept for the benchmarks that need no network.

    python benchmarks/suite_features.py --suite SUITE --load-clip WEIGHTS/load_clip.py --out FEATURES

For every task one safetensors file: features [M, N, h] (float32) of all eight prompts on the training images
(train800val200) in one fixed random order, and labels [N]. Tasks whose file exists are left alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from real_task import POOL, load_clip

from hgprompt import FrozenViT, PromptPool, encode
from hgprompt.data import load_task, make_loader
from hgprompt.files import read_safetensors, write_safetensors


@torch.no_grad()
def gather(vit: FrozenViT, pool: PromptPool, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [M, N, h] and labels [N], in a fixed random order."""
    parts = [
        (encode(vit, pool.stack(), images).float(), labels)
        for images, labels in make_loader(load_task(folder, "train800val200"), vit.image_size)
    ]
    features, labels = torch.cat([f for f, _ in parts], dim=1), torch.cat([y for _, y in parts])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return features[:, order], labels[order]


def load_features(directory: Path, task: str) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Names of the prompts, features [M, N, h] and labels [N] that this script wrote for a task."""
    tensors, record = read_safetensors(directory / f"{task}.safetensors")
    return record["prompts"], tensors["features"], tensors["labels"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--load-clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", help="default: those of the pool")
    arguments = parser.parse_args()
    pool = PromptPool.load(POOL)
    vit = FrozenViT.from_timm(load_clip(arguments.load_clip, 112))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks or pool.names:
        path = arguments.out / f"{task}.safetensors"
        if path.exists():
            continue
        start = time.perf_counter()
        features, labels = gather(vit, pool, arguments.suite / task)
        write_safetensors(path, {"features": features, "labels": labels}, {"prompts": list(pool.names), "task": task})
        print(f"{task}: {list(features.shape)} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
