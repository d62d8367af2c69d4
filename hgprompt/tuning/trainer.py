"""train: R runs of a learner side by side on one labelled task.

The runs share each pass through the network where their method allows it, and cost less than R runs for it. They never
influence one another: the loss is a sum of R losses, and the optimisers work element by element. Runs with one seed see
the same images in the same order; runs with several seeds see several orders.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgprompt.data.folders import ImageDataset
from hgprompt.data.images import LabelledImages
from hgprompt.errors import DataError, OptionError
from hgprompt.files import digest_of_tensors, make_directory
from hgprompt.kernels.compiler import copied
from hgprompt.progress import Progress, Reporter
from hgprompt.tuning.checkpoint import Checkpoint, digest_of_images
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.learner import HEAD, Learner
from hgprompt.tuning.streams import stream
from hgprompt.workers import of_a_worker

Images = LabelledImages | ImageDataset

SHARED = ("epochs", "batch_size", "optimizer", "warmup")
"""What the configs of runs that are trained together have in common."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What `train` returns, for R runs; what was learned is in the learner's parameters.

    Attributes:
        history: one record per epoch: epoch (from 1), and lists over the R runs of lr (at its end), loss and
            train_accuracy (means over the epoch's steps, before each step) and, where it was measured, test_accuracy.
            A run that diverged has a loss of NaN and an accuracy of 0 from that epoch on.
        diverged: for each run, whether its loss or its parameters stopped being finite.
        seconds: of training, without evaluation and without fitting heads (this call's alone after a resume).
    """

    history: tuple[dict[str, Any], ...]
    diverged: tuple[bool, ...]
    seconds: float

    @property
    def accuracies(self) -> list[float]:
        """[R] on the test images after the last epoch; NaN where there were none."""
        last: list[float] = self.history[-1].get("test_accuracy", [math.nan] * len(self.diverged))
        return last


def train(
    learner: Learner,
    configs: Sequence[TuneConfig],
    train: Images,
    test: Images | None = None,
    *,
    num_classes: int | None = None,
    evaluate_every: int = 0,
    strict: bool = False,
    names: Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    starts_identified: bool = False,
    progress: bool | Reporter = False,
    stage: str = "tuning",
    workers: int = 0,
) -> Trained:
    """Train the runs of a learner; their parameters and buffers are changed in place.

    Args:
        learner: R runs. configs: R, alike in epochs, batch_size, optimizer and warmup.
        train, test: images and labels. test is only ever evaluated.
        num_classes: C, for a check of the labels; None: those of train and test.
        evaluate_every: accuracy on `test` after every so many epochs; always after the last. 0: after the last alone.
        strict: raise where a run stops being finite. Without it that run stays where it is, marked as diverged, and
            the others go on.
        names: of the runs: in messages, and in the checkpoint's identity.
        checkpoint: a file that is written after every epoch, whole or not at all. Where it is there already, training
            continues from it and ends with the same bits as an undisturbed one (on a GPU only with learners of prompts
            or heads: PyTorch's gradients for weights of a network are summed in any order there). A disk that is full
            costs a checkpoint, with a warning, and not the training.
        identity: what else makes two trainings one and the same (backbone, method), JSON-able: only then may one
            continue the other's checkpoint. Images, configs and starting parameters count anyway.
        starts_identified: the identity says all that the starting parameters depend on. They need not be the same bits
            then: found with another number of threads, they differ in the last ones.
        progress, stage: a bar (loss, accuracy, time left), or a callable (stage, done, total); stage names it.
        workers: processes that decode images, where these are not in memory.

    Raises:
        DataError, OptionError: images or configs that cannot be used. DataError with `strict`, see there.
        FileFormatError, OptionError: a checkpoint that is damaged, or of another training. OutputError: there can be no
        file at its place.
    """
    runs = _Runs(learner, configs)
    names = tuple(names) if names is not None else tuple(f"run {r + 1}" for r in range(len(configs)))
    num_classes = num_classes or max(train.num_classes, 0 if test is None else test.num_classes)
    check_tasks(train, test)
    for images in (train, test):
        if images is not None:
            check_labels(images, num_classes)
    config, store = configs[0], None
    history: list[dict[str, Any]] = []
    if checkpoint is not None:
        described = dict(identity or {}) | {
            "learner": type(learner).__name__,
            "runs": list(names),
            "starts": "identified" if starts_identified else digest_of_tensors(runs.tensors().values()),
            "train": digest_of_images(train),
            "test": "" if test is None else digest_of_images(test),
            "evaluate_every": evaluate_every,
            "configs": [dataclasses.asdict(config) for config in configs],
        }
        if learner.head != "random":
            described["head"] = learner.head
        make_directory(Path(checkpoint).parent)  # now, and not after the first epoch
        store = Checkpoint(checkpoint, described)
        history = _load(store, runs)
    steps_per_epoch = -(-len(train) // config.batch_size)
    total = config.epochs * steps_per_epoch
    seconds = 0.0

    def refuse(epoch: int) -> None:
        if strict and runs.diverged.any():
            bad = [name for name, gone in zip(names, runs.diverged.tolist(), strict=True) if gone]
            raise DataError(f"the loss of {bad} is not finite in epoch {epoch + 1}: a smaller lr may help")

    with torch.inference_mode(False), torch.enable_grad(), Progress.of(progress) as report:
        if not history:
            learner.begin(_batches(train, torch.arange(len(train), device="cpu"), config.batch_size, workers))
        batches = None if len(history) == config.epochs else _Batches(learner, configs, train, workers)
        for epoch in range(len(history), config.epochs):
            assert batches is not None
            sums = torch.zeros(2, len(configs), dtype=torch.float64, device="cpu")
            began = time.perf_counter()
            for i, (inputs, labels) in enumerate(batches.of_epoch(epoch)):
                step = epoch * steps_per_epoch + i
                losses, correct = runs.step(inputs, labels, step, total)
                refuse(epoch)
                sums += torch.stack([losses, correct])
                mean = (losses.nanmean() / labels.shape[-1], correct.mean() / labels.shape[-1])
                report(stage, step + 1, total, f"loss {mean[0]:.3f}, accuracy {mean[1]:.2f}")
            seconds += time.perf_counter() - began
            runs.check()
            refuse(epoch)
            rate = config.rate((epoch + 1) * steps_per_epoch - 1, total)
            record: dict[str, Any] = {
                "epoch": epoch + 1,
                "lr": [c.lr * c.batch_size / 256 * rate for c in configs],
                "loss": runs.where_finite(sums[0] / len(train), math.nan),
                "train_accuracy": runs.where_finite(sums[1] / len(train), 0.0),
            }
            last = epoch + 1 == config.epochs
            if test is not None and (last or (evaluate_every and (epoch + 1) % evaluate_every == 0)):
                found = accuracy(
                    learner, test, batch_size=config.batch_size, workers=workers,
                    report=lambda done, of: report("testing", done, of),
                )  # fmt: skip
                record["test_accuracy"] = runs.where_finite(found, 0.0)
            history.append(record)
            if store is not None:
                store.write(runs.tensors(), [_as_json(record) for record in history])
    return Trained(tuple(history), tuple(runs.diverged.tolist()), seconds)


def accuracy(
    learner: Learner,
    images: Images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    report: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Accuracy [R] in 0 … 1 of a learner's runs; float64 on the CPU. report(done, total): after every batch."""
    done, correct = 0, torch.zeros((), dtype=torch.int64, device="cpu")
    with torch.no_grad():
        for batch, labels in _batches(images, torch.arange(len(images), device="cpu"), batch_size, workers):
            logits = learner.logits(learner.prepare(batch))
            correct = correct + (logits.argmax(2) == copied(labels, logits.device)).sum(1)  # nothing waits for it
            done += len(labels)
            if report is not None:
                report(done, len(images))
    return correct.double().cpu() / len(images)


class _Runs:
    """What is trained: the learner's parameters, their optimiser, and which runs are still finite."""

    def __init__(self, learner: Learner, configs: Sequence[TuneConfig]) -> None:
        if len(configs) == 0 or len(configs) != len(learner.parameters):
            raise OptionError(f"there are {len(learner.parameters)} runs and {len(configs)} configs: one for each")
        for name in SHARED:
            values = {getattr(config, name) for config in configs}
            if len(values) > 1:
                raise OptionError(f"runs that are trained together share {name}, got {sorted(values)}")
        self.learner, self.config = learner, configs[0]
        self.diverged = torch.zeros(len(configs), dtype=torch.bool, device="cpu")
        groups: list[dict[str, Any]] = []
        for config, parameters in zip(configs, learner.parameters, strict=True):
            scale = config.batch_size / 256
            head_lr = config.lr if config.head_lr is None else config.head_lr
            body = [value for name, value in parameters.items() if not name.startswith(HEAD)]
            head = [value for name, value in parameters.items() if name.startswith(HEAD)]
            for members, lr in ((body, config.lr), (head, head_lr)):
                if members:
                    groups.append({"params": members, "lr": lr * scale, "weight_decay": config.weight_decay})
        self.optimizer: torch.optim.Optimizer
        if self.config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups)
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
                    state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)

    def step(self, inputs: Tensor, labels: Tensor, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """One step: losses [R], summed over the images, and correct answers [R], before the step."""
        self.optimizer.zero_grad(set_to_none=True)
        losses, correct = self.learner.backward(inputs, labels, step)
        for run in (~losses.isfinite() & ~self.diverged).nonzero().flatten().tolist():
            self._freeze(run)
        for run in self.diverged.nonzero().flatten().tolist():
            for parameter in self.learner.parameters[run].values():
                parameter.grad = None  # which an optimiser passes over
        rate = self.config.rate(step, steps)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        return losses, correct

    def check(self) -> None:
        """Freeze runs whose tensors are not finite, although their last loss was; and once more those that were frozen:
        they went through the network all the same, which leaves its mark on buffers."""
        for run, tensors in enumerate(self._by_run()):
            if self.diverged[run] or not all(bool(t.isfinite().all()) for t in tensors.values()):
                self._freeze(run)

    def _freeze(self, run: int) -> None:
        self.diverged[run] = True
        with torch.no_grad():
            for tensor in self._by_run()[run].values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.nan_to_num(0.0, 0.0, 0.0))  # a checkpoint holds finite numbers

    def where_finite(self, values: Tensor, other: float) -> list[float]:
        """The runs' values, and `other` for those that diverged."""
        return [other if gone else v for v, gone in zip(values.tolist(), self.diverged.tolist(), strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """All that changes in a step, by name, [R, ...]; copies."""
        runs = self._by_run()
        return {name: torch.stack([tensors[name].detach() for tensors in runs]) for name in runs[0]}

    def restore(self, stored: Mapping[str, Tensor], diverged: Sequence[bool]) -> None:
        """The reverse of `tensors`."""
        self.diverged = torch.tensor(diverged, device="cpu")
        with torch.no_grad():
            for run, tensors in enumerate(self._by_run()):
                for name, tensor in tensors.items():
                    tensor.copy_(stored[name][run])

    def _by_run(self) -> list[dict[str, Tensor]]:
        runs = []
        for r, parameters in enumerate(self.learner.parameters):
            tensors = dict(parameters)
            for name, parameter in parameters.items():
                state = self.optimizer.state[parameter]
                tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
            if self.learner.buffers:
                tensors |= {f"buffer.{name}": value for name, value in self.learner.buffers[r].items()}
            runs.append(tensors)
        return runs


class _Batches:
    """What the runs see in each step: inputs and labels, [B, ...] where they share a seed, else [R, B, ...]."""

    def __init__(self, learner: Learner, configs: Sequence[TuneConfig], images: Images, workers: int) -> None:
        self.learner, self.images, self.workers = learner, images, workers
        self.batch_size = configs[0].batch_size
        self.seeds = [config.seed for config in configs]
        self.prepared: tuple[Tensor, Tensor] | None = None
        if learner.caches:
            with torch.no_grad():
                parts = [
                    (learner.prepare(batch), labels)
                    for batch, labels in _batches(
                        images, torch.arange(len(images), device="cpu"), self.batch_size, workers
                    )
                ]
            inputs, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            self.prepared = inputs, labels
        elif isinstance(images, LabelledImages):
            self.prepared = images.images, images.labels

    def of_epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The order depends on the seed and the epoch alone."""
        different = sorted(set(self.seeds))
        orders = {seed: _order(len(self.images), seed, epoch) for seed in different}
        if self.prepared is not None:
            shared = len(different) == 1
            order = orders[different[0]] if shared else torch.stack([orders[seed] for seed in self.seeds])
            inputs, labels = self.prepared
            for chosen in order.split(self.batch_size, dim=-1):
                yield self._finished(inputs[chosen.to(inputs.device)]), labels[chosen]
            return
        streams = [_batches(self.images, orders[seed], self.batch_size, self.workers) for seed in different]
        for batches in zip(*streams, strict=True):
            if len(different) == 1:
                yield self._finished(batches[0][0]), batches[0][1]
            else:
                own = [batches[different.index(seed)] for seed in self.seeds]
                yield self._finished(torch.stack([b[0] for b in own])), torch.stack([b[1] for b in own])

    def _finished(self, inputs: Tensor) -> Tensor:
        """Inputs as the learner wants them: what is cached is so already."""
        if self.learner.caches:
            return inputs
        with torch.no_grad():
            if inputs.ndim == 4:
                return self.learner.prepare(inputs)
            return self.learner.prepare(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=stream(seed, "order", epoch), device="cpu")


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


def _load(store: Checkpoint, runs: _Runs) -> list[dict[str, Any]]:
    """Continue from a checkpoint where there is one; its history."""
    stored, history = store.read(runs.tensors())
    if history:
        runs.restore(stored, [loss is None for loss in history[-1]["loss"]])
    return [record | {"loss": [math.nan if v is None else v for v in record["loss"]]} for record in history]


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: a loss that is not there is None."""
    return dict(record) | {"loss": [None if math.isnan(v) else v for v in record["loss"]]}


def check_tasks(train: Images, test: Images | None) -> None:
    """Raise DataError for what are no images with labels, or for tests on other classes."""
    for which, images in (("train", train), ("test", test)):
        if not isinstance(images, (LabelledImages, ImageDataset)) and not (which == "test" and images is None):
            raise DataError(
                f"{which} must be LabelledImages(name, images uint8 [N, 3, H, W], labels int64 [N]), or what "
                f"hgprompt.data.decode and open_images make of a folder; got {type(images).__name__}"
            )
    names, others = train.class_names or (), (None if test is None else test.class_names) or ()
    different = [c for c, (here, there) in enumerate(zip(names, others, strict=False)) if here != there]
    if different:
        c = different[0]
        raise DataError(
            f"the test images have other classes: label {c} is {others[c]!r} there, and {names[c]!r} in training "
            f"({len(different)} of {len(names)} differ)"
        )


def check_labels(images: Images, num_classes: int) -> None:
    """Raise DataError for no images or labels outside 0 … C-1, OptionError for a single class."""
    if len(images) == 0:
        raise DataError("there are no images to tune or test on")
    labels = images.labels.tolist() if isinstance(images, LabelledImages) else [label for _, label in images.samples]
    if min(labels) < 0 or max(labels) >= num_classes:
        raise DataError(f"labels run from {min(labels)} to {max(labels)}, classes from 0 to {num_classes - 1}")
    if num_classes < 2:
        raise OptionError("a task has at least 2 classes: with one, there is nothing to learn")
