"""Prompts as a learner (VPT), and tune and evaluate: the trainer for those who have prompts and want prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgprompt.arguments import kind_of
from hgprompt.backbone import FrozenViT
from hgprompt.encoder import Impl, MicroBatch, check_prompts, encode, pull_back
from hgprompt.errors import OptionError, PromptError
from hgprompt.kernels.compiler import copied
from hgprompt.pool import PromptPool
from hgprompt.progress import Reporter
from hgprompt.tuning import trainer
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.head import HEAD_STARTS, HeadStart
from hgprompt.tuning.learner import (
    HEAD,
    Learner,
    cross_entropies,
    fit_linear_heads,
    linear_head,
    linear_logits,
    on_host,
)
from hgprompt.tuning.result import TuneResult
from hgprompt.tuning.streams import stream, uniform

Penalty = Callable[[Tensor, slice, slice], Tensor]
"""penalty(logits [r, b, C], runs, images) → [r], summed over those images."""


class PromptLearner(Learner):
    """A prompt and a linear head for each run, on one frozen network: R runs are R prompts of one batch.

    Args:
        backbone: the frozen network. parameters: for each run, "prompt" [p, d] or [L, p, d], "head.weight" [C, h] and
            "head.bias" [C]; `start` makes them.
        configs: of the runs, for the seed and share of prompt dropout; empty: none is dropped.
        head: "random": heads start as the parameters say; "fitted": in closed form (`fitted_head`), on the features of
            the training images under each run's starting prompt, one more pass forward.
        micro_batch, impl: as for `encode`.
    """

    def __init__(
        self,
        backbone: FrozenViT,
        parameters: Sequence[Mapping[str, Tensor]],
        configs: Sequence[TuneConfig] = (),
        *,
        head: HeadStart = "random",
        micro_batch: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        self.backbone, self.parameters, self.configs = backbone, parameters, configs
        self.head = head
        # One for all steps: what a GPU had no memory for is not tried again.
        self.options: dict[str, Any] = {"micro_batch": MicroBatch(micro_batch), "impl": impl}

    @classmethod
    def of(
        cls, backbone: FrozenViT, prompts: Sequence[Tensor], num_classes: int, configs: Sequence[TuneConfig],
        **options: Any,
    ) -> PromptLearner:  # fmt: skip
        """Of prompts, one for each config, which `start` copies; options as for the class."""
        return cls(backbone, cls.start(backbone, prompts, num_classes, configs), configs, **options)

    @staticmethod
    def start(
        backbone: FrozenViT, prompts: Sequence[Tensor], num_classes: int, configs: Sequence[TuneConfig]
    ) -> list[dict[str, Tensor]]:
        """Parameters of one run for each prompt [p, d] or [L, p, d] and config: copies, with heads drawn by the seed.

        Raises:
            PromptError: prompts that do not fit the backbone.
        """
        check_prompts(backbone, torch.stack(list(prompts)))
        return [
            {
                "prompt": prompt.detach().to(backbone.device, torch.float32).clone().requires_grad_(),
                **linear_head(backbone.width, num_classes, config.seed, backbone.device),
            }
            for prompt, config in zip(prompts, configs, strict=True)
        ]

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self.head == "random":
            return
        with torch.no_grad():
            # Points of a grid start from one prompt: each different prompt is looked at once.
            prompts = self._prompts()
            distinct, which = torch.unique(prompts.flatten(1), dim=0, return_inverse=True)
            distinct = distinct.view(-1, *prompts.shape[1:])
            parts = [(encode(self.backbone, distinct, x, **self.options).cpu(), labels) for x, labels in batches]
        features, labels = torch.cat([f for f, _ in parts], dim=1).float(), torch.cat([y for _, y in parts])
        fit_linear_heads(self.parameters, features, which.tolist(), labels)

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        prompts = self._prompts()
        mask = self._kept(step)
        prompts = prompts if mask is None else prompts * mask
        features = encode(self.backbone, prompts, inputs, **self.options)
        return linear_logits(features, self.parameters)

    def backward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        mask = self._kept(step)
        prompts = self._prompts().detach()
        losses, correct, gradient = pull_back_runs(
            self.backbone, prompts if mask is None else prompts * mask, inputs, labels, self.parameters,
            penalty=self.penalty(inputs), **self.options,
        )  # fmt: skip
        gradient = gradient if mask is None else gradient * mask
        for of_run, slope in zip(self.parameters, gradient, strict=True):
            of_run["prompt"].grad = slope.to(torch.float32)
        return losses, correct

    def penalty(self, inputs: Tensor) -> Penalty | None:
        """What a method adds to the cross-entropy on this batch; here nothing."""
        return None

    def _prompts(self) -> Tensor:
        return torch.stack([of_run["prompt"] for of_run in self.parameters])

    def _kept(self, step: int | None) -> Tensor | None:
        """Dropout's factors [R, ...] of the prompts in a step, or None."""
        if step is None or not any(config.prompt_dropout for config in self.configs):
            return None
        shape, factors = self.parameters[0]["prompt"].shape, {}
        runs = [(config.seed, config.prompt_dropout) for config in self.configs]
        for seed, share in set(runs):  # runs of a grid have both in common
            # A generator of the step alone: a resumed run draws what the undisturbed one drew.
            kept = uniform(stream(seed, "prompt dropout", step), *shape) >= share
            factors[seed, share] = copied(kept, self.backbone.device).float() / (1 - share)
        return torch.stack([factors[run] for run in runs])


def pull_back_runs(
    backbone: FrozenViT,
    prompts: Tensor,
    images: Tensor,
    labels: Tensor,
    parameters: Sequence[Mapping[str, Tensor]],
    *,
    penalty: Penalty | None = None,
    micro_batch: int | MicroBatch | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of a batch, back to the prompts (returned) and to the heads (in their .grad).

    Args:
        prompts: [R, p, d] or [R, L, p, d]. images: [B, 3, H, W] or [R, B, 3, H, W]. labels: [B] or [R, B].
        parameters: of the runs; their heads are read, and get gradients.
        penalty: added to the cross-entropy. micro_batch, impl: as for `encode`.

    Returns:
        losses [R], summed over images, correct answers [R] (float64, CPU), and gradients of the mean loss, as prompts.
    """
    runs, count = len(prompts), images.shape[-4]
    labels = copied(labels, backbone.device).expand(runs, count)
    heads = [{name: value.detach() for name, value in p.items() if name.startswith(HEAD)} for p in parameters]

    def loss(features: Tensor, runs: slice, images: slice) -> Tensor:
        logits = linear_logits(features, heads[runs])
        losses = cross_entropies(logits, labels[runs, images])[0]
        return losses if penalty is None else losses + penalty(logits, runs, images)

    features, _, gradient = pull_back(backbone, prompts, images, loss, micro_batch=micro_batch, impl=impl)
    # The heads' gradients come from the same features, all at once.
    logits = linear_logits(features, parameters)
    losses, correct = cross_entropies(logits, labels)
    if penalty is not None:
        losses = losses + penalty(logits, slice(0, runs), slice(0, count))
    (losses.sum() / count).backward()
    return *on_host(losses, correct), gradient / count


def tune(
    backbone: FrozenViT,
    starts: Mapping[str, Tensor],
    train: trainer.Images,
    *,
    test: trainer.Images | None = None,
    num_classes: int | None = None,
    config: TuneConfig | None = None,
    head: HeadStart = "random",
    evaluate_every: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | Reporter = False,
    stage: str = "tuning",
    workers: int = 0,
    micro_batch: int | None = None,
    impl: Impl = "auto",
) -> TuneResult:
    """Tune prompts and linear heads on a labelled task (VPT, shallow or deep).

    The runs see the same images in the same order and start from the same head: a comparison of starts is paired.

    Args:
        backbone: the frozen network; its dtype is the compute dtype. Prompts, heads and optimiser are float32.
        starts: {name: [p, d]} (deep: [L, p, d]), one run each. They are not changed.
        train, test: images and labels. test is only ever evaluated.
        num_classes: C; None: train's (and test's, where it has more). Classes beyond those with a name are "class 7".
        config: how to tune; None: TuneConfig().
        head: what the heads start as: "random", drawn with the config's seed, or "fitted" to the features of the
            training images under each start, in closed form (`fitted_head`), which takes one more pass forward.
        evaluate_every: accuracy on `test` after every so many epochs; always after the last. 0: after the last alone.
        checkpoint: a file that is written after every epoch, whole or not at all. Where it is there already, the run
            continues from it and ends with the same bits as an undisturbed one.
        progress, stage: a bar (loss, accuracy, time left), or a callable (stage, done, total); stage names it.
        workers: processes that decode images, where these are not in memory.
        micro_batch, impl: as for `encode`.

    Raises:
        PromptError, DataError, OptionError: starts, images or options that cannot be used. DataError also where the
        loss stops being finite. FileFormatError, OptionError: a checkpoint that is damaged, or of another run.
        OutputError: there can be no file at its place.
    """
    config = config or TuneConfig()
    if head not in HEAD_STARTS:
        raise OptionError(f"head must be one of {', '.join(map(repr, HEAD_STARTS))}, got {head!r}")
    prompts = _checked(backbone, starts)
    trainer.check_tasks(train, test)
    names, configs = tuple(starts), [config] * len(prompts)
    num_classes = num_classes or max(train.num_classes, 0 if test is None else test.num_classes)
    learner = PromptLearner.of(backbone, prompts, num_classes, configs, head=head, micro_batch=micro_batch, impl=impl)
    trained = trainer.train(
        learner, configs, train, test, num_classes=num_classes, evaluate_every=evaluate_every, names=names,
        strict=True, checkpoint=checkpoint, identity=identity_of(backbone), progress=progress, stage=stage,
        workers=workers,
    )  # fmt: skip
    final = {name: torch.stack([p[name].detach().cpu() for p in learner.parameters]) for name in learner.parameters[0]}
    return TuneResult(
        names=names,
        prompts=final["prompt"],
        head_weight=final[f"{HEAD}.weight"],
        head_bias=final[f"{HEAD}.bias"],
        history=tuple(record | {"lr": record["lr"][0]} for record in trained.history),
        config=config,
        task=train.name,
        class_names=_class_names(train, test, num_classes),
        backbone=backbone.info,
        seconds=trained.seconds,
    )


def identity_of(backbone: FrozenViT) -> dict[str, object]:
    """What a checkpoint remembers of the network."""
    return {
        "backbone": backbone.fingerprint,
        "image_size": list(backbone.image_size),
        "normalisation": [list(backbone.mean), list(backbone.std)],
        "dtype": str(backbone.dtype).removeprefix("torch."),
    }


def evaluate(
    backbone: FrozenViT,
    prompts: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    images: trainer.Images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    micro_batch: int | None = None,
    impl: Impl = "auto",
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Accuracy [K] in 0 … 1 of K prompts [K, p, d] with K heads [K, C, h], [K, C]; float64 on the CPU.

    report(done, total) is called after every batch of images.
    """
    parameters = [
        {"prompt": prompt, f"{HEAD}.weight": weight.to(backbone.device), f"{HEAD}.bias": bias.to(backbone.device)}
        for prompt, weight, bias in zip(prompts, head_weight, head_bias, strict=True)
    ]
    learner = PromptLearner(backbone, parameters, micro_batch=micro_batch, impl=impl)
    return trainer.accuracy(learner, images, batch_size=batch_size, workers=workers, report=report)


def _class_names(train: trainer.Images, test: trainer.Images | None, num_classes: int) -> tuple[str, ...] | None:
    """A name for every output of the heads, which may be more than the training images have names for."""
    if train.class_names is None:
        return None
    known = train.class_names if test is None else max(train.class_names, test.class_names or (), key=len)
    return (*known[:num_classes], *(f"class {c}" for c in range(len(known), num_classes)))


def _checked(backbone: FrozenViT, starts: Mapping[str, Tensor]) -> list[Tensor]:
    if not isinstance(starts, Mapping) or not starts:
        raise PromptError("starts must be {name: prompt} with at least one prompt: random_prompt makes one")
    for name, prompt in starts.items():
        if not isinstance(prompt, Tensor) or not prompt.is_floating_point():
            raise PromptError(
                f"start {name!r} must be a floating point tensor [p, d] or [L, p, d], got {kind_of(prompt)}"
            )
    shapes = {name: list(prompt.shape) for name, prompt in starts.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise PromptError(f"starts must have one shape, got {shapes}")
    if isinstance(starts, PromptPool):
        starts.check_backbone(backbone.info)
    for name, prompt in starts.items():
        if not bool(prompt.isfinite().all()):
            raise PromptError(f"start {name!r} holds NaN or infinity")
    return [prompt.detach().float() for prompt in starts.values()]
