"""Results do not depend on torch's default device and dtype, which a user may have set for a program of their own."""

from __future__ import annotations

import contextlib

import literal
import pytest
import torch

from hgprompt import (
    EnsembleResult,
    EnsembleStatistics,
    PromptPool,
    WeightProblem,
    alignment_loss,
    encode,
    fast_ensemble,
    h_score,
    load_backbone,
    optimize_weights,
    select_prompts,
)
from hgprompt.data import PROCEDURAL_TASKS, LabelledImages, render_task
from hgprompt.transferability import leep, log_me, nce, trace_ratio, transrate
from hgprompt.tuning import TuneConfig, evaluate, random_prompt, tune


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def default_device():
    """On "meta" tensors have no values: whatever is left to the default fails, as it would beside a real GPU."""
    return torch.device("meta")


def _drawn(*shape):
    return torch.randn(*shape, dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(0))


def _labels(count, classes):
    return torch.arange(count, device="cpu") % classes


def _loader(count=36):
    labels = _labels(count, 3)
    images = _drawn(count, 3, 16, 16) + labels[:, None, None, None]
    return [(images[i : i + 9], labels[i : i + 9]) for i in range(0, count, 9)]


VIT = literal.tiny_vit()


def _task(count):
    images = (_drawn(count, 3, 16, 16) * 60 + 128).clamp(0, 255).to(torch.uint8)
    return LabelledImages("drawn", images, _labels(count, 3))


def ensemble(folder, **options):
    result = fast_ensemble(_drawn(3, 2, 16), _loader(), backbone=VIT, device="cpu", **options)
    result.save(folder)
    loaded = EnsembleResult.load(folder)
    return loaded.weights, loaded.prompt, loaded.gradient_cosines, result.weight_std


def moments(folder):
    return ensemble(folder, keep="moments", head="lda", checkpoint_dir=folder / "pass")


def early_stop(folder):
    return ensemble(folder, tolerance=0.5, gradient_images=20)


def statistics(folder):
    found = []
    for keep in ("features", "moments"):
        kept = EnsembleStatistics(folds=4, keep=keep)
        for start in range(0, 40, 15):
            kept.update(_drawn(3, 55, 8)[:, start : start + 15], _labels(55, 3)[start : start + 15])
        problem = WeightProblem(kept)
        solution = problem.solve(0.0)
        found += [
            solution.weights,
            problem.source_h_scores,
            problem.source_covariance,
            problem.leave_one_out(0.0)[0].weights,
        ]
    return found


def objective(folder):
    f, y = _drawn(40, 8), _labels(40, 3)
    gradients = _drawn(3, 20)
    alpha = torch.full((3,), 1 / 3, dtype=torch.float64, device="cpu")
    kept = EnsembleStatistics()
    kept.update(_drawn(3, 40, 8), y)
    found = optimize_weights(kept, gradients @ gradients.T)
    return h_score(f, y), alignment_loss(gradients, alpha), found.weights


def metrics(folder):
    f, y = _drawn(40, 8), _labels(40, 3)
    predicted = _drawn(40, 5).softmax(1)
    return leep(predicted, y), nce(predicted.argmax(1), y), log_me(f, y), transrate(f, y), trace_ratio(f, y)


def selection(folder):
    found = []
    for method in ("halving", "greedy", "ranking"):
        kept = select_prompts(_drawn(6, 2, 16), _loader(72), size=3, backbone=VIT, device="cpu", method=method)
        found.append(kept.pool.stack())
    return found


def bundled(folder):
    vit = load_backbone("mini", device="cpu")
    pool = PromptPool({"a": _drawn(2, vit.width), "b": _drawn(2, vit.width) + 1}, backbone=vit.info)
    pool.save(folder / "pool.safetensors")
    images = render_task(next(iter(PROCEDURAL_TASKS)), 6).images
    with torch.no_grad():
        return vit.prefix, encode(vit, PromptPool.load(folder / "pool.safetensors").stack(), images)


def tuning(folder):
    vit, found = load_backbone("mini", img_size=16, device="cpu"), []
    start = {"random": random_prompt(vit, 2, seed=1), "other": random_prompt(vit, 2, seed=2)}
    for head in ("random", "fitted"):
        config = TuneConfig(epochs=2, batch_size=6, prompt_dropout=0.1)
        tuned = tune(
            vit, start, _task(12), test=_task(6), config=config, head=head, checkpoint=folder / f"{head}.safetensors"
        )
        found += [tuned.prompts, evaluate(vit, tuned.prompts, tuned.head_weight, tuned.head_bias, _task(6))]
    return found


@pytest.mark.parametrize("default", [default_dtype, default_device])
@pytest.mark.parametrize(
    "work", [ensemble, moments, early_stop, statistics, objective, metrics, selection, bundled, tuning]
)
def test_the_same_bits_under_other_defaults(work, default, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    expected = work(tmp_path / "plain")
    with default():
        found = work(tmp_path / "other")
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        else:
            assert one == other
