"""Learner: what a method trains on one task, R runs side by side.

The trainer (`hgprompt.tuning.trainer`) knows learners only: it draws batches, sets learning rates, steps optimisers,
writes checkpoints. A learner knows what is trained and what a batch costs: nothing of epochs or files.

Letters in shapes: R runs, B images of a batch, C classes, h feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hgprompt.kernels.compiler import copied
from hgprompt.tuning.head import HeadStart, fitted_head
from hgprompt.tuning.streams import stream, uniform_within

HEAD = "head"
"""Names of parameters that begin so belong to the classifier: it has a learning rate of its own, and does not count as
parameters of the method."""


class Learner(ABC):
    """R runs of one method on one task. They see equally many images in a step, and never influence one another.

    Attributes:
        parameters: for each run, {name: leaf tensor, float32, requires grad}. The same names in every run.
        buffers: for each run, {name: tensor}: what training changes without a gradient (BatchNorm's statistics).
        caches: whether `prepare` does work that is worth keeping for every training image.
        head: what linear heads start as: "random", as they were made, or "fitted" to the training images by `begin`.
    """

    caches: ClassVar[bool] = False
    head: HeadStart = "random"
    parameters: Sequence[Mapping[str, Tensor]]
    buffers: Sequence[Mapping[str, Tensor]] = ()

    def prepare(self, images: Tensor) -> Tensor:
        """What images [B, 3, H, W] become before anything that is trained: inputs [B, ...], the same for all runs and
        epochs."""
        return images

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called before the first step, and not where training goes on from a checkpoint; here nothing.

        Args:
            batches: all training images [B, 3, H, W] and labels [B], once, in their own order.
        """
        return

    @abstractmethod
    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        """Logits [R, B, C] in float32.

        Args:
            inputs: prepared images, [B, ...] for all runs, or [R, B, ...], to each run its own.
            step: number of the training step, for what is random in it; None: evaluation mode.
        """

    def backward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss of a batch, in .grad of every parameter.

        Args:
            inputs: as for `logits`. labels: [B] or [R, B], as the inputs. step: number of the training step.

        Returns:
            losses [R], summed over the images, and correct answers [R]; float64 on the CPU.
        """
        logits = self.logits(inputs, step=step)
        losses, correct = cross_entropies(logits, labels)
        (losses.sum() / logits.shape[1]).backward()
        return on_host(losses, correct)

    @property
    def num_parameters(self) -> int:
        """Trained numbers per run, beside the head."""
        return sum(p.numel() for name, p in self.parameters[0].items() if not name.startswith(HEAD))


def cross_entropies(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [R], summed over images, and correct answers [R], of logits [R, B, C], labels [B] or [R, B]."""
    runs, images, _ = logits.shape
    labels = copied(labels, logits.device).expand(runs, images)
    each = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(runs, images).sum(1), (logits.detach().argmax(2) == labels).sum(1)


def on_host(losses: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [R] and correct answers [R] as float64 on the CPU, in one copy: on a GPU, each copy is a wait."""
    both = torch.stack([losses.detach().double(), correct.double()]).cpu()
    return both[0], both[1]


def linear_head(width: int, num_classes: int, seed: int, device: torch.device) -> dict[str, Tensor]:
    """nn.Linear's start drawn with a seed: {"head.weight": [C, width], "head.bias": [C]}, leaves that require grad."""
    bound = width**-0.5
    generator = stream(seed, "head")
    weight = uniform_within(bound, generator, num_classes, width)
    bias = uniform_within(bound, generator, num_classes)
    return {f"{HEAD}.weight": weight.to(device).requires_grad_(), f"{HEAD}.bias": bias.to(device).requires_grad_()}


def linear_logits(features: Tensor, parameters: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Logits [R, B, C] in float32 of features [R, B, h] under each run's linear head."""
    weight, bias = (torch.stack([of_run[f"{HEAD}.{name}"] for of_run in parameters]) for name in ("weight", "bias"))
    return torch.baddbmm(bias[:, None], features.float(), weight.mT)


def fit_linear_heads(
    parameters: Sequence[Mapping[str, Tensor]], features: Tensor, which: Sequence[int], labels: Tensor
) -> None:
    """Put `fitted_head`s of features [K, N, h] into the heads of the runs: run r has those of features which[r].

    A run whose features are not finite keeps the head it has: it will diverge with its first step, and alone.
    """
    fitted: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for own, k in zip(parameters, which, strict=True):
            if not features[k].isfinite().all():
                continue
            if k not in fitted:
                fitted[k] = fitted_head(features[k], labels, len(own[f"{HEAD}.bias"]))
            for name, value in zip(("weight", "bias"), fitted[k], strict=True):
                own[f"{HEAD}.{name}"].copy_(value)
