"""Linear: a linear head on the frozen network's features. What every other method has beside its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.head import HeadStart
from hgprompt.tuning.learner import Learner, fit_linear_heads, linear_head, linear_logits
from hgprompt.tuning.method import Cost, Method, Prepared, Setting


class LinearLearner(Learner):
    """R linear heads on features [B, h], which are computed once for every image."""

    caches: ClassVar[bool] = True

    def __init__(
        self, backbone: FrozenViT, num_classes: int, configs: Sequence[TuneConfig], head: HeadStart = "random"
    ) -> None:
        self.backbone, self.head = backbone, head
        self.parameters = [linear_head(backbone.width, num_classes, c.seed, backbone.device) for c in configs]

    def prepare(self, images: Tensor) -> Tensor:
        """Features [B, h] without a prompt, float32."""
        with torch.no_grad():
            return self.backbone(images).float()

    def begin(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        if self.head == "random":
            return
        parts = [(self.prepare(images), labels) for images, labels in batches]
        features, labels = torch.cat([f for f, _ in parts]).cpu(), torch.cat([y for _, y in parts])
        fit_linear_heads(self.parameters, features[None], [0] * len(self.parameters), labels)

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        return linear_logits(inputs.expand(len(self.parameters), -1, -1), self.parameters)


class Linear(Method):
    """A linear head alone."""

    name = "Linear"
    kind = "linear"
    head: ClassVar[HeadStart] = "random"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        learner = LinearLearner(setting.backbone, setting.num_classes, configs, self.head)
        return Prepared(learner, Cost(forward=len(setting.train)) if self.head == "fitted" else Cost())

    def num_parameters(self, setting: Setting) -> int:
        return 0


class FittedLinear(Linear):
    """The same from a head in closed form: what that alone is worth."""

    name = "Linear, fitted head"
    head = "fitted"
    revision = 1
