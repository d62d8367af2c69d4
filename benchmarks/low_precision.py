"""What products of 16 and of 8 bits in the network do to α, on real tasks, without hardware that has them.

    python benchmarks/low_precision.py --suite SUITE --load-clip WEIGHTS/load_clip.py --out OUT --tasks emoji stamps

Simulated: every linear layer of the blocks gets its inputs and weights rounded as such hardware would take them (8
bits: one scale for each row of activations and each output of a weight), adds up in float32, and hands on bfloat16.
Attention, norms and the residual stream stay as they are, and the prompts' gradients are those of float32: the pass
over all images is what 8 bits could make faster.

Then bfloat16 with gradients of its own: attention rounds its weights and results too, and what comes back through a
layer is rounded as what goes into it; once with a float32 residual stream, and once with one of two bfloat16 tensors,
whose gradient is bfloat16 (`hgprompt.kernels.norm`), as the kernels have it.

One file for every task and either; with --to all are gathered into one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from clip_starts import features_under
from real_task import POOL, load_clip
from torch import Tensor

from hgprompt import EnsembleStatistics, FrozenViT, PromptPool, fast_ensemble, operations
from hgprompt.data import LabelledImages, decode, load_task
from hgprompt.files import make_directory, write_text
from hgprompt.kernels import attention
from hgprompt.kernels.norm import Stream, normalize
from hgprompt.optimize import WeightProblem
from hgprompt.strict_json import jsonable

GRADIENT_IMAGES = 48
QUESTIONS = {  # name: λ, whether H is divided by C - 1
    "λ=1": (1.0, True), "λ=0.1": (0.1, True), "λ=0": (0.0, True), "raw H, λ=1": (1.0, False),
}  # fmt: skip


def bfloat16(x: Tensor) -> Tensor:
    """Its gradient is rounded too: it goes the same way back."""
    return x.bfloat16().float()


def fp8(x: Tensor) -> Tensor:
    """e4m3, whose largest number is 448, at one scale a row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def int8(x: Tensor) -> Tensor:
    """Symmetric, at one scale a row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


@contextlib.contextmanager
def linear_layers_in(rounded: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """F.linear with its inputs rounded; what comes out is bfloat16's."""
    exact = torch.nn.functional.linear
    weights: dict[tuple[int, torch.Size], Tensor] = {}

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        key = (weight.data_ptr(), weight.shape)
        if key not in weights:
            weights[key] = rounded(weight)
        return bfloat16(exact(rounded(x), weights[key], bias))

    with mock.patch("torch.nn.functional.linear", linear):
        yield


def attention_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = bfloat16((q @ k.transpose(-1, -2) * scale).softmax(-1))
    return bfloat16(weights @ v).transpose(1, 2).flatten(2)


def stream_of_two(x: Stream, y: Tensor | None, kind, eps: float, dtype: torch.dtype) -> tuple[Stream, Tensor]:
    """`norm.add_normalize_reference`, its two tensors of bfloat16 as their sum in float32."""
    if y is None:
        return x, normalize(x.high, kind, eps)
    total = x.high + y
    high = bfloat16(total)
    return Stream(high + bfloat16((total - high).detach())), normalize(total, kind, eps)


BFLOAT16 = dataclasses.replace(
    operations.REFERENCE,
    segment_attention=functools.partial(attention.segment_attention_reference, one_segment=attention_in_bfloat16),
    packed_attention=functools.partial(attention.packed_attention_reference, one_segment=attention_in_bfloat16),
)
THROUGHOUT = {
    "bfloat16 throughout, float32 stream": BFLOAT16,
    "bfloat16 throughout": dataclasses.replace(BFLOAT16, add_normalize=stream_of_two),
}


def measure(vit: FrozenViT, folder: Path, limit: int) -> dict:
    """One task: α of every precision beside α of float32, and how far the features are."""
    pool, images, record = task_of(vit, folder, limit)
    began = time.perf_counter()
    gram = passed_over(vit, pool, images)[1]
    exact = features_under(vit, pool.stack(), images)
    alphas = weights_of(statistics_of(exact, images.labels), gram)
    centred = exact - exact.mean(1, keepdim=True)
    record |= {"weights": {"float32": as_lists(alphas)}, "l1": {}, "features": {}}
    for rounded in (bfloat16, fp8, int8):
        with linear_layers_in(rounded):
            found = features_under(vit, pool.stack(), images)
        name = rounded.__name__
        low = weights_of(statistics_of(found, images.labels), gram)
        record["weights"][name], record["l1"][name] = as_lists(low), distances(low, alphas)
        record["features"][name] = float((found - exact).norm() / centred.norm())
        print(folder.name, name, record["l1"][name], f"features {record['features'][name]:.4f}", flush=True)
    return record | {"seconds": time.perf_counter() - began, "torch": torch.__version__}


def measure_throughout(vit: FrozenViT, folder: Path, limit: int) -> dict:
    """One task: α of a pass that is bfloat16 in features and gradients, beside α of float32."""
    pool, images, record = task_of(vit, folder, limit)
    began = time.perf_counter()
    statistics, gram = passed_over(vit, pool, images)
    alphas = weights_of(statistics, gram)
    record |= {"weights": {"float32": as_lists(alphas)}, "l1": {}, "cosines": {}}
    for name, ops in THROUGHOUT.items():
        with linear_layers_in(bfloat16), mock.patch.object(operations, "REFERENCE", ops):
            found, cosines = passed_over(vit, pool, images)
        low = weights_of(found, cosines)
        record["weights"][name], record["l1"][name] = as_lists(low), distances(low, alphas)
        record["cosines"][name] = float((cosines - gram).abs().max())
        print(folder.name, name, record["l1"][name], f"cosines {record['cosines'][name]:.4f}", flush=True)
    return record | {"seconds": time.perf_counter() - began, "torch": torch.__version__}


def task_of(vit: FrozenViT, folder: Path, limit: int) -> tuple[PromptPool, LabelledImages, dict]:
    """The pool without the task's own prompt, images, and what a record says of them."""
    pool = PromptPool.load(POOL).without(folder.name)
    images = decode(load_task(folder, "train800val200"), vit.image_size, limit=limit, seed=43)
    return pool, images, {
        "task": folder.name, "images": len(images), "classes": images.num_classes, "prompts": list(pool.names),
    }  # fmt: skip


def passed_over(vit: FrozenViT, pool: PromptPool, images: LabelledImages) -> tuple[EnsembleStatistics, Tensor]:
    """What a pass kept of the features, and the gradients' cosines."""
    some = min(GRADIENT_IMAGES, len(images))
    found = fast_ensemble(pool, images.batches(32), backbone=vit, gradient_images=some, keep_problem=True)
    return found.problem.statistics, found.gradient_cosines


def statistics_of(features: Tensor, labels: Tensor) -> EnsembleStatistics:
    kept = EnsembleStatistics()
    kept.update(features, labels)
    return kept


def as_lists(alphas: dict[str, Tensor]) -> dict[str, list[float]]:
    return {question: w.tolist() for question, w in alphas.items()}


def distances(alphas: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {question: float((w - exact[question]).abs().sum()) for question, w in alphas.items()}


def weights_of(statistics: EnsembleStatistics, gram: Tensor) -> dict[str, Tensor]:
    """α for every question."""
    problems = {normalize: WeightProblem(statistics, gram, normalize=normalize) for normalize in (True, False)}
    return {name: problems[normalize].solve(lam).weights for name, (lam, normalize) in QUESTIONS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--load-clip", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=160, help="training images")
    parser.add_argument("--to", type=Path, help="gather all that OUT holds into one file of results")
    args = parser.parse_args()
    vit = FrozenViT.from_timm(load_clip(args.load_clip, 112))
    for task in args.tasks:
        for measured, ending in ((measure, "json"), (measure_throughout, "throughout.json")):
            done = make_directory(args.out) / f"{task}.{ending}"
            if not done.exists():
                record = measured(vit, args.suite / task, args.limit)
                write_text(done, json.dumps(jsonable(record), allow_nan=False) + "\n")
    if args.to:
        found = {path.name.partition(".")[::2]: json.loads(path.read_text()) for path in args.out.glob("*.json")}
        about = {"backbone": "CLIP ViT-B/16, int8-dequantised, 112 pixels", "gradient_images": GRADIENT_IMAGES}
        for part, ending in (("runs", "json"), ("throughout", "throughout.json")):
            about[part] = [found[task, e] for task, e in sorted(found) if e == ending]
        write_text(args.to, json.dumps(jsonable(about), ensure_ascii=False, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
