"""tune: K prompts and K linear heads trained side by side on one labelled task.

The K runs see the same images in the same order, start from the same head, and share each pass through the network as
K prompts of one batch: a comparison of starts is paired, and costs less than K runs. They never influence one another:
the loss is a sum of K losses, and the optimisers work element by element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hgprompt.backbone import FrozenViT
from hgprompt.data.folders import ImageDataset
from hgprompt.data.images import LabelledImages
from hgprompt.encoder import Impl, check_prompts, encode, pull_back
from hgprompt.errors import DataError, OptionError, PromptError, of_a_worker
from hgprompt.progress import Progress, Reporter
from hgprompt.tuning.checkpoint import Checkpoint, identity
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.result import TuneResult

Images = LabelledImages | ImageDataset


def tune(
    backbone: FrozenViT,
    starts: Mapping[str, Tensor],
    train: Images,
    *,
    test: Images | None = None,
    num_classes: int | None = None,
    config: TuneConfig | None = None,
    evaluate_every: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | Reporter = False,
    stage: str = "tuning",
    workers: int = 0,
    micro_batch: int | None = None,
    impl: Impl = "auto",
) -> TuneResult:
    """Tune prompts and linear heads on a labelled task (VPT, shallow or deep).

    Args:
        backbone: the frozen network; its dtype is the compute dtype. Prompts, heads and optimiser are float32.
        starts: {name: [p, d]} (deep: [L, p, d]), one run each. They are not changed.
        train, test: images and labels. test is only ever evaluated.
        num_classes: C; None: train's (and test's, where it has more).
        config: how to tune; None: TuneConfig().
        evaluate_every: accuracy on `test` after every so many epochs; always after the last. 0: after the last alone.
        checkpoint: a file that is written after every epoch, whole or not at all. Where it is there already, the run
            continues from it and ends with the same bits as an undisturbed one.
        progress, stage: a bar (loss, accuracy, time left), or a callable (stage, done, total); stage names it.
        workers: processes that decode images, where these are not in memory.
        micro_batch, impl: as for `encode`.

    Raises:
        PromptError, DataError, OptionError: starts, images or options that cannot be used. DataError also where the
        loss stops being finite. FileFormatError, OptionError: a checkpoint that is damaged, or of another run.
    """
    config = config or TuneConfig()
    names, prompts = _stacked(backbone, starts)
    num_classes = num_classes or max(train.num_classes, 0 if test is None else test.num_classes)
    _check_labels(train, num_classes)
    if test is not None:
        _check_labels(test, num_classes)
    state = _State(backbone, prompts, num_classes, config)
    store = None
    history: list[dict[str, Any]] = []
    if checkpoint is not None:
        store = Checkpoint(checkpoint, identity(backbone, names, prompts, train, test, config, evaluate_every))
        history = store.restore(state.tensors())
    steps_per_epoch = -(-len(train) // config.batch_size)
    total = config.epochs * steps_per_epoch
    seconds = 0.0
    with torch.inference_mode(False), Progress.of(progress) as report:
        for epoch in range(len(history), config.epochs):
            sums = torch.zeros(2, len(names), dtype=torch.float64)
            began = time.perf_counter()
            for i, (images, labels) in enumerate(_epoch(train, config, epoch, workers)):
                step = epoch * steps_per_epoch + i
                losses, correct = state.step(images, labels, step, total, micro_batch=micro_batch, impl=impl)
                sums += torch.stack([losses, correct])
                if not bool(losses.isfinite().all()):
                    bad = [n for n, v in zip(names, losses.tolist(), strict=True) if v - v != 0]
                    raise DataError(f"the loss of {bad} is not finite in epoch {epoch + 1}: a smaller lr may help")
                mean = losses.mean() / len(images), correct.mean() / len(images)
                report(stage, step + 1, total, f"loss {mean[0]:.3f}, accuracy {mean[1]:.2f}")
            seconds += time.perf_counter() - began
            record = {
                "epoch": epoch + 1,
                "lr": config.lr * config.batch_size / 256 * config.rate((epoch + 1) * steps_per_epoch - 1, total),
                "loss": (sums[0] / len(train)).tolist(),
                "train_accuracy": (sums[1] / len(train)).tolist(),
            }
            last = epoch + 1 == config.epochs
            if test is not None and (last or (evaluate_every and (epoch + 1) % evaluate_every == 0)):
                record["test_accuracy"] = evaluate(
                    backbone, state.prompts.detach(), state.weight.detach(), state.bias.detach(), test,
                    batch_size=config.batch_size, workers=workers, micro_batch=micro_batch, impl=impl,
                    report=lambda done, of: report("testing", done, of),
                ).tolist()  # fmt: skip
            history.append(record)
            if store is not None:
                store.write(state.tensors(), history)
    return TuneResult(
        names=names,
        prompts=state.prompts.detach().cpu().clone(),
        head_weight=state.weight.detach().cpu().clone(),
        head_bias=state.bias.detach().cpu().clone(),
        history=tuple(history),
        config=config,
        task=train.name,
        class_names=train.class_names,
        backbone=backbone.info,
        seconds=seconds,
    )


def evaluate(
    backbone: FrozenViT,
    prompts: Tensor,
    head_weight: Tensor,
    head_bias: Tensor,
    images: Images,
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
    correct = torch.zeros(len(prompts), dtype=torch.float64)
    head_weight, head_bias = head_weight.to(backbone.device), head_bias.to(backbone.device)
    order = torch.arange(len(images))
    done = 0
    with torch.no_grad():
        for batch, labels in _batches(images, order, batch_size, workers):
            features = encode(backbone, prompts, batch, micro_batch=micro_batch, impl=impl).float()
            logits = torch.baddbmm(head_bias[:, None], features, head_weight.mT)
            correct += (logits.argmax(2) == labels.to(logits.device)).sum(1).cpu()
            done += len(labels)
            if report is not None:
                report(done, len(images))
    return correct / len(images)


class _State:
    """Prompts, heads and optimiser of K runs."""

    def __init__(self, backbone: FrozenViT, prompts: Tensor, num_classes: int, config: TuneConfig) -> None:
        self.backbone, self.config = backbone, config
        runs, device = len(prompts), backbone.device
        # nn.Linear's start, the same for every run.
        bound = backbone.width**-0.5
        generator = torch.Generator().manual_seed(config.seed)
        weight = (torch.rand(num_classes, backbone.width, generator=generator) * 2 - 1) * bound
        bias = (torch.rand(num_classes, generator=generator) * 2 - 1) * bound
        self.prompts = prompts.to(device, torch.float32).clone().requires_grad_()
        self.weight = weight.repeat(runs, 1, 1).to(device).requires_grad_()
        self.bias = bias.repeat(runs, 1).to(device).requires_grad_()
        scale = config.batch_size / 256
        head_lr = config.lr if config.head_lr is None else config.head_lr
        groups = [
            {"params": [self.prompts], "lr": config.lr * scale},
            {"params": [self.weight, self.bias], "lr": head_lr * scale},
        ]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """Buffers at zero from the first step on, so that a checkpoint has the same tensors at any time."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if self.config.optimizer == "sgd":
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                else:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def tensors(self) -> dict[str, Tensor]:
        """All that changes in a step, by name: the tensors themselves."""
        named = {"prompts": self.prompts, "head_weight": self.weight, "head_bias": self.bias}
        tensors = {name: value.detach() for name, value in named.items()}
        for name, parameter in named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def step(
        self, images: Tensor, labels: Tensor, step: int, steps: int, *, micro_batch: int | None, impl: Impl
    ) -> tuple[Tensor, Tensor]:
        """One step on one batch: losses [K], summed over the images, and correct answers [K], before the step."""
        labels = labels.to(self.backbone.device)
        mask = self._dropout_mask(step)
        prompts = self.prompts.detach() if mask is None else self.prompts.detach() * mask

        def loss(features: Tensor, runs: slice, chosen: slice) -> Tensor:
            return self._losses(features, labels[chosen], self.weight.detach()[runs], self.bias.detach()[runs])[0]

        features, _, gradient = pull_back(self.backbone, prompts, images, loss, micro_batch=micro_batch, impl=impl)
        # The heads' gradients come from the same features, all at once.
        losses, logits = self._losses(features, labels, self.weight, self.bias)
        self.optimizer.zero_grad(set_to_none=True)
        (losses.sum() / len(images)).backward()
        gradient = gradient / len(images)
        self.prompts.grad = (gradient if mask is None else gradient * mask).to(torch.float32)
        rate = self.config.rate(step, steps)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        correct = (logits.detach().argmax(2) == labels).sum(1)
        return losses.detach().double().cpu(), correct.double().cpu()

    @staticmethod
    def _losses(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies [K], summed over the images, and logits [K, B, C], in float32."""
        logits = torch.baddbmm(bias[:, None], features.float(), weight.mT)
        runs, images, _ = logits.shape
        each = cross_entropy(logits.flatten(0, 1), labels.repeat(runs), reduction="none")
        return each.view(runs, images).sum(1), logits

    def _dropout_mask(self, step: int) -> Tensor | None:
        share = self.config.prompt_dropout
        if share == 0:
            return None
        # A generator of the step alone: a resumed run draws what the undisturbed one drew.
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) % 2**63)
        kept = torch.rand(self.prompts.shape[1:], generator=generator) >= share
        return kept.to(self.prompts.device, torch.float32) / (1 - share)


def _epoch(train: Images, config: TuneConfig, epoch: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch; the order depends on the seed and the epoch alone."""
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + epoch) % 2**63)
    return _batches(train, torch.randperm(len(train), generator=generator), config.batch_size, workers)


def _batches(images: Images, order: Tensor, batch_size: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(images, LabelledImages):
        for chosen in order.split(batch_size):
            yield images[chosen]
        return
    from torch.utils.data import DataLoader

    loader = DataLoader(
        images,
        batch_sampler=[b.tolist() for b in order.split(batch_size)],
        num_workers=workers,
        generator=torch.Generator(),  # else its workers' seed would be drawn from the global one
    )
    try:
        yield from loader
    except DataError as error:
        raise of_a_worker(error) from None


def _stacked(backbone: FrozenViT, starts: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
    if not isinstance(starts, Mapping) or not starts:
        raise PromptError("starts must be {name: prompt} with at least one prompt: random_prompt makes one")
    shapes = {name: list(prompt.shape) for name, prompt in starts.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise PromptError(f"starts must have one shape, got {shapes}")
    prompts = torch.stack([prompt.detach().float().cpu() for prompt in starts.values()])
    check_prompts(backbone, prompts)
    return tuple(starts), prompts


def _check_labels(images: Images, num_classes: int) -> None:
    if len(images) == 0:
        raise DataError("there are no images to tune or test on")
    labels = images.labels.tolist() if isinstance(images, LabelledImages) else [label for _, label in images.samples]
    if min(labels) < 0 or max(labels) >= num_classes:
        raise DataError(f"labels run from {min(labels)} to {max(labels)}, classes from 0 to {num_classes - 1}")
    if num_classes < 2:
        raise OptionError("a task has at least 2 classes: with one, there is nothing to learn")
