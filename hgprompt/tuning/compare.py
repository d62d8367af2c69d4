"""compare_starts: is a start from the pool worth anything? Tuned side by side with the starts that need no method."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.data.images import LabelledImages
from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import FileFormatError, OptionError
from hgprompt.files import digest_of_tensors
from hgprompt.pool import PromptPool
from hgprompt.progress import Reporter
from hgprompt.result import EnsembleResult
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.head import HeadStart
from hgprompt.tuning.prompts import identity_of, tune
from hgprompt.tuning.start import random_prompt

RANDOM, SINGLE, UNIFORM, HGPROMPT = "random", "best single by H", "uniform", "HGPrompt"


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_starts` returns, for S seeds, E budgets and K starts.

    Attributes:
        starts: names of the K starts. seeds, epochs: in the order of the results.
        accuracy: on the test images at the end of each budget, [E, S, K] in 0 … 1, float64.
        curves: on the test images after each of curve_epochs of the largest budget, [len(curve_epochs), S, K].
        ensembles: the result of `fast_ensemble`, for each seed. singles: the source with the highest H, for each seed.
        seconds: of tuning, for each budget, over all seeds and starts. num_classes: C, of the target.
    """

    starts: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    accuracy: Tensor
    curve_epochs: tuple[int, ...]
    curves: Tensor
    ensembles: tuple[EnsembleResult, ...]
    singles: tuple[str, ...]
    seconds: tuple[float, ...]
    num_classes: int

    def record(self) -> dict[str, Any]:
        """All numbers, JSON-able."""
        return {
            "starts": list(self.starts),
            "seeds": list(self.seeds),
            "epochs": list(self.epochs),
            "accuracy": self.accuracy.tolist(),
            "curve_epochs": list(self.curve_epochs),
            "curves": self.curves.tolist(),
            "best_single": list(self.singles),
            "weights": [dict(zip(e.names, e.weights.tolist(), strict=True)) for e in self.ensembles],
            "h_score": [e.h_score for e in self.ensembles],
            "uniform_h_score": [e.uniform_h_score for e in self.ensembles],
            "source_h_scores": [dict(zip(e.names, e.source_h_scores.tolist(), strict=True)) for e in self.ensembles],
            "alignment_loss": [e.alignment_loss for e in self.ensembles],
            "seconds": list(self.seconds),
            "num_classes": self.num_classes,
        }


def compare_starts(
    backbone: FrozenViT,
    pool: PromptPool,
    train: Callable[[int], LabelledImages],
    test: LabelledImages,
    *,
    seeds: Sequence[int] = (42, 44, 82),
    epochs: Sequence[int] = (10,),
    config: TuneConfig | None = None,
    head: HeadStart = "random",
    evaluate_every: int = 1,
    variants: Sequence[float] = (),
    ensemble_options: dict[str, Any] | None = None,
    folder: Path | None = None,
    progress: bool | Reporter = False,
) -> Comparison:
    """Tune from a random prompt, the source of the highest H, the uniform mean and the HGPrompt mixture: equal budgets.

    For each seed, the training images train(seed) go through `fast_ensemble` once; then all starts are tuned on them
    side by side, with the same head, order of images and number of epochs. The random start is drawn with the seed.

    Args:
        pool: source prompts; the target's own must not be among them.
        train: the training images of a seed. test: only ever evaluated.
        seeds, epochs: one run each of every start; epochs are separate budgets with their own schedule.
        config: everything else of the tuning; its epochs and seed are not used. head: as for `tune`.
        evaluate_every: epochs between the points of the curves; the last epoch is always one.
        variants: further λ to mix with, as starts of their own ("HGPrompt λ=0").
        ensemble_options: of `fast_ensemble`.
        folder: where to keep checkpoints, ensembles among them; a comparison that was interrupted goes on from them.
        progress: as for `fast_ensemble` and `tune`.

    Raises:
        OptionError: no seeds or epochs, or the same ones twice; a seed that the pool's prompts began with. Others as
            `fast_ensemble` and `tune` do.
    """
    if not seeds or not epochs:
        raise OptionError("a comparison needs at least one seed and one number of epochs")
    for what, values in {"seeds": seeds, "epochs": epochs, "variants": variants}.items():
        if len(set(values)) < len(values):
            raise OptionError(f"{what} must differ, got {list(values)}")
    began = [seed for seed in seeds if any(pool.metadata[name].get("init_seed") == seed for name in pool)]
    if began:
        raise OptionError(
            f"seed {began[0]} is that of the sources' common start, and the random start would be it: take other seeds"
        )
    config = config or TuneConfig()
    names = (RANDOM, SINGLE, UNIFORM, HGPROMPT, *(f"{HGPROMPT} λ={lam:g}" for lam in variants))
    accuracy = torch.full((len(epochs), len(seeds), len(names)), float("nan"), dtype=torch.float64, device="cpu")
    curves: list[Tensor] = []
    curve_epochs: tuple[int, ...] = ()
    ensembles, singles, seconds = [], [], [0.0] * len(epochs)
    for s, seed in enumerate(seeds):
        images = train(seed)
        options: dict[str, Any] = {"seed": seed} | (ensemble_options or {})

        def mix(options: dict[str, Any], images: LabelledImages = images) -> EnsembleResult:
            def run() -> EnsembleResult:
                return fast_ensemble(pool, images.batches(64), backbone=backbone, progress=progress, **options)

            return run() if folder is None else _kept(folder, f"{identity_of(backbone)}{options}", pool, images, run)

        result = mix(options)
        single = result.best_single
        ensembles.append(result)
        singles.append(single)
        starts = {
            RANDOM: random_prompt(backbone, pool.num_tokens, deep=pool.is_deep, seed=seed),
            SINGLE: pool[single],
            UNIFORM: pool.stack().mean(0),
            HGPROMPT: result.prompt,
        }
        for name, lam in zip(names[len(starts) :], variants, strict=True):
            starts[name] = mix(options | {"lam": lam}).prompt
        for e, budget in enumerate(epochs):
            longest = budget == max(epochs)
            tuned = tune(
                backbone, starts, images, test=test, config=dataclasses.replace(config, epochs=budget, seed=seed),
                head=head, evaluate_every=evaluate_every if longest else 0, progress=progress,
                stage=f"seed {s + 1}/{len(seeds)}",
                checkpoint=None if folder is None else folder / f"{test.name}-{budget}-{seed}.checkpoint.safetensors",
            )  # fmt: skip
            accuracy[e, s] = torch.tensor(tuned.history[-1]["test_accuracy"], dtype=torch.float64, device="cpu")
            if longest:
                rows = [record for record in tuned.history if "test_accuracy" in record]
                curve_epochs = tuple(record["epoch"] for record in rows)
                curve = [record["test_accuracy"] for record in rows]
                curves.append(torch.tensor(curve, dtype=torch.float64, device="cpu"))
            seconds[e] += tuned.seconds
    return Comparison(
        starts=names,
        seeds=tuple(seeds),
        epochs=tuple(epochs),
        accuracy=accuracy,
        curve_epochs=curve_epochs,
        curves=torch.stack(curves, dim=1),
        ensembles=tuple(ensembles),
        singles=tuple(singles),
        seconds=tuple(seconds),
        num_classes=test.num_classes,
    )


def _kept(
    folder: Path, what: str, pool: PromptPool, images: LabelledImages, run: Callable[[], EnsembleResult]
) -> EnsembleResult:
    """An ensemble of this pool for these images, from the folder if it is there, else made and kept.

    Made again it may differ in its last bits (by the number of threads, say), and a checkpoint of its tuning would be
    refused.
    """
    tensors = [*pool.values(), images.images, images.labels]
    parts = f"{what}{list(pool)}{digest_of_tensors(tensors)}"
    place = folder / f"ensemble-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    try:
        return EnsembleResult.load(place)
    except FileFormatError:  # not there, or of an earlier version
        result = run()
        result.save(place)
        return result
