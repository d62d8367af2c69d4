"""The main job on a real task with a real ViT-B/16; skipped where the images and weights are not at hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import literal
import numpy as np
import pytest
import torch

from hgprompt import FrozenViT, PromptPool, fast_ensemble
from hgprompt.bundled import fast_dtype
from hgprompt.data import load_task, make_loader

SHARED = Path(__file__).parents[2] / "shared"
POOL = Path(__file__).parent / "assets" / "clip_suite_pool.safetensors"

pytestmark = pytest.mark.skipif(
    not (SHARED / "weights" / "load_clip.py").is_file() or not (SHARED / "suite").is_dir(),
    reason="needs the CLIP ViT-B/16 weights and the image suite beside the checkout",
)


@pytest.fixture(scope="module")
def clip():
    spec = importlib.util.spec_from_file_location("load_clip", SHARED / "weights" / "load_clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_clip_vit_b16(img_size=112).requires_grad_(False)


def test_agrees_with_the_literal_loop(clip, all_cores):
    pool = PromptPool.load(POOL).subset(["clipart", "fashion"])
    vit = FrozenViT.from_timm(clip)
    loader = make_loader(load_task(SHARED / "suite" / "emoji"), vit.image_size, limit=12, batch_size=5)
    result = fast_ensemble(pool, loader, backbone=vit, lam=0.1, gradient_images=4)

    images = torch.cat([x for x, _ in loader])
    labels = torch.cat([y for _, y in loader])
    with torch.no_grad():
        features = literal.features(clip, pool.stack(), vit.prepare(images)).double().numpy()
    a = result.shrinkage_intensity
    for i in range(len(pool)):
        # float32 features of a real network, through a covariance with N < h: 1e-4 of H is what rounding leaves
        assert float(result.source_h_scores[i]) == pytest.approx(
            literal.h_score(features[i], labels.numpy(), a), rel=1e-4
        )
    mixed = np.tensordot(result.weights.numpy(), features, axes=1)
    assert result.h_score == pytest.approx(literal.h_score(mixed, labels.numpy(), a), rel=1e-4)
    assert result.gap < 1e-6
    assert result.n_images == 12


@pytest.mark.skipif(fast_dtype("cpu") is not torch.bfloat16, reason="bfloat16 is emulated here: ten minutes")
def test_bfloat16_gives_the_same_weights(clip, all_cores):
    pool = PromptPool.load(POOL).subset(["clipart", "fashion", "mnist"])
    loader = list(make_loader(load_task(SHARED / "suite" / "stamps"), (112, 112), limit=40))
    exact, low = (
        fast_ensemble(pool, loader, backbone=FrozenViT.from_timm(clip, dtype=dtype), gradient_images=8)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float((exact.weights - low.weights).abs().sum()) < 0.01  # the bound that low precision has to keep
