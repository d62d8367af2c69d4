"""The main job on a real task, beside the literal loop: same images, same prompts, timm's own modules, float32.

    python benchmarks/real_task.py --suite SUITE --load-clip WEIGHTS/load_clip.py --task emoji --limit 240

The loop knows nothing of the package: prompt after prompt, batch after batch, through timm's model; features kept;
Ledoit–Wolf, H-score and LDA written out in float64; gradients by autograd; α by SciPy's SLSQP from several starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import literal

from hgprompt import FrozenViT, PromptPool, fast_ensemble
from hgprompt.data import load_task, make_loader
from hgprompt.sample import folds_of

POOL = Path(__file__).parents[1] / "tests" / "assets" / "clip_suite_pool.safetensors"
FOLDS = 8


def load_clip(path: Path, size: int):
    spec = importlib.util.spec_from_file_location("load_clip", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_clip_vit_b16(img_size=size).requires_grad_(False)


def literal_run(model, prompts, images, labels, lam):
    """(weights, objective, source H, cosines) by the loop."""
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    with torch.no_grad():
        features = torch.stack(
            [torch.cat([literal.features(model, p[None], x)[0] for x, _ in batches]) for p in prompts]
        )
    f = features.double().mean(0).numpy()
    f = f - f.mean(0)
    n, h = f.shape
    s = f.T @ f / n
    spread = ((f**2).sum(1) ** 2).mean() - (s**2).sum()
    intensity = spread / n / ((s**2).sum() - np.trace(s) ** 2 / h)

    fold = folds_of(np.arange(n), FOLDS)
    mixture = features.double().mean(0)
    gradients = []
    for i, prompt in enumerate(prompts):
        heads = [
            lambda x, k=k: literal.lda_logits(mixture[fold != k], labels[fold != k], x, intensity) for k in range(FOLDS)
        ]
        logits = torch.empty(n, len(labels.unique()), dtype=torch.float64)
        for k in range(FOLDS):
            logits[fold == k] = heads[k](features[i, fold == k])
        factor = literal.temperature(logits, labels)
        total = torch.zeros_like(prompt)
        for k in range(FOLDS):
            leaf = prompt.clone().requires_grad_()
            out = literal.features(model, leaf[None], images[fold == k])[0]
            loss = torch.nn.functional.cross_entropy(factor * heads[k](out), labels[fold == k], reduction="sum")
            total += torch.autograd.grad(loss, leaf)[0]
        gradients.append(total.numpy())
    unit = np.stack([g.ravel() / np.linalg.norm(g) for g in gradients]).astype(np.float64)
    centred = features.double() - features.double().mean(1, keepdim=True)
    sources = [literal.h_score(c.numpy(), labels.numpy(), intensity) for c in centred]

    def objective(weights):
        score = literal.h_score(np.tensordot(weights, centred.numpy(), axes=1), labels.numpy(), intensity)
        return -score / (len(labels.unique()) - 1) + lam * literal.alignment_loss(np.stack(gradients), weights)

    m = len(prompts)
    best = min(
        (
            minimize(
                objective, start, method="SLSQP", bounds=[(0, 1)] * m, options={"ftol": 1e-10},
                constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            )
            for start in [np.full(m, 1 / m), *np.random.default_rng(0).dirichlet(np.ones(m), size=2)]
        ),
        key=lambda found: found.fun,
    )  # fmt: skip
    return best.x, best.fun, sources, unit @ unit.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--load-clip", type=Path, required=True)
    parser.add_argument("--task", default="emoji")
    parser.add_argument("--limit", type=int, default=240)
    parser.add_argument("--lam", type=float, default=0.1)
    arguments = parser.parse_args()
    model = load_clip(arguments.load_clip, 112)
    vit = FrozenViT.from_timm(model)
    pool = PromptPool.load(POOL)
    pool = pool.without(arguments.task) if arguments.task in pool else pool
    loader = make_loader(load_task(arguments.suite / arguments.task), vit.image_size, limit=arguments.limit)
    batches = list(loader)

    start = time.perf_counter()
    result = fast_ensemble(pool, batches, backbone=vit, lam=arguments.lam, folds=FOLDS, gradient_images=None)
    ours = time.perf_counter() - start
    print(result)
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    start = time.perf_counter()
    weights, objective, sources, cosines = literal_run(model, pool.stack(), vit.prepare(images), labels, arguments.lam)
    theirs = time.perf_counter() - start
    print(f"\n{'':34}fast_ensemble     literal loop")
    print(f"{'seconds':34}{ours:13.1f}    {theirs:13.1f}")
    print(f"{'objective':34}{result.objective:13.8f}    {objective:13.8f}")
    differences = {
        "weights": np.abs(result.weights.numpy() - weights).max(),
        "H of one prompt": np.abs(result.source_h_scores.numpy() - sources).max(),
        "gradient cosines": np.abs(result.gradient_cosines.numpy() - cosines).max(),
    }
    print("largest difference: " + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))


if __name__ == "__main__":
    main()
