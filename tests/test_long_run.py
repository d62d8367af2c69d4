"""A long pass takes no more memory than a short one (benchmarks/long_run.py has 100,000 images)."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import hgprompt.checkpoint
from hgprompt import fast_ensemble

BATCH, BATCHES, SETTLED, M, WIDTH = 10, 300, 100, 8, 64


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("checkpoints", [False, True])
def test_memory_is_flat(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(hgprompt.checkpoint, "SHARE", 1e9)  # many of them: a leak in one would be seen
    g = torch.Generator().manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=WIDTH, depth=1, num_heads=2, num_classes=0).eval()
    prompts = torch.randn(M, 2, WIDTH, generator=g)
    found = []

    def stream():
        for _ in range(BATCHES):
            labels = torch.randint(0, 3, (BATCH,), generator=g)
            yield torch.randn(BATCH, 3, 16, 16, generator=g) + labels[:, None, None, None], labels

    def report(stage, done, total):
        if stage == "images" and done in (SETTLED, BATCHES):
            gc.collect()
            found.append((len(gc.get_objects()), _resident_bytes()))

    fast_ensemble(
        prompts, stream(), backbone=model, keep="moments", folds=2, gradient_images=16, starts=1, max_steps=2,
        progress=report, checkpoint_dir=tmp_path if checkpoints else None, checkpoint_every=0.03,
    )  # fmt: skip
    (objects, memory), (later_objects, later_memory) = found
    # One object or tensor that stays of each batch would make 200; a few that come and go are of the reservoir.
    assert later_objects - objects < 50
    # The features of 2,000 images would take 4.1 MB, the images 6.1 MB; the allocator itself moves by less than 1.
    assert later_memory - memory < 2e6
