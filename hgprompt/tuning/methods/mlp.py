"""MLP-k: k linear layers in place of the linear head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.errors import OptionError
from hgprompt.kernels.compiler import copied
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.methods.linear import LinearLearner
from hgprompt.tuning.network_learner import generator
from hgprompt.tuning.streams import stream, uniform, uniform_within

DROPOUT = 0.1
EPSILON, MOMENTUM = 1e-5, 0.1  # nn.BatchNorm1d's


class MLPLearner(LinearLearner):
    """R heads of hidden layers Linear → ReLU → BatchNorm → Dropout, all of the features' width, and a linear layer.

    The hidden layers start as VPT's: weights normal with variance 2 / width, biases as nn.Linear draws them. A step on
    a single image, which has no variance, is normalised with the running statistics and leaves them.
    """

    def __init__(self, backbone: FrozenViT, num_classes: int, configs: Sequence[TuneConfig], hidden: int) -> None:
        super().__init__(backbone, num_classes, configs)
        self.hidden, self.width = hidden, backbone.width
        self.seeds = [config.seed for config in configs]
        device = backbone.device
        self.parameters = [
            {**own, **{k: v.to(device).requires_grad_() for k, v in self._start(config).items()}}
            for own, config in zip(self.parameters, configs, strict=True)
        ]
        zero = torch.zeros(self.width, dtype=torch.float32, device=device)
        self.buffers = [
            {
                f"hidden.{i}.{name}": zero + start
                for i in range(hidden)
                for name, start in {"running_mean": 0, "running_var": 1}.items()
            }
            for _ in configs
        ]

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        x = inputs.expand(len(self.parameters), -1, -1)
        masks = None if step is None else self._masks(x.shape[1], step)
        for i in range(self.hidden):
            weight, bias = self._stacked(f"hidden.{i}.weight"), self._stacked(f"hidden.{i}.bias")
            x = torch.baddbmm(bias[:, None], x, weight.mT).relu()
            x = self._normalised(x, i, training=step is not None and x.shape[1] > 1)
            if masks is not None:
                x = x * masks[:, i]
        return super().logits(x, step=step)

    def _stacked(self, name: str) -> Tensor:
        """A parameter of all runs, [R, ...]."""
        return torch.stack([own[name] for own in self.parameters])

    def _normalised(self, x: Tensor, layer: int, *, training: bool) -> Tensor:
        """BatchNorm of x [R, B, h], each run with its own statistics."""
        names = [f"hidden.{layer}.running_mean", f"hidden.{layer}.running_var"]
        if training:
            mean, variance = x.mean(1), x.var(1, correction=0)
            with torch.no_grad():
                for run, own in enumerate(self.buffers):
                    # As torch does it: the running variance is the unbiased one.
                    for name, value in zip(names, (mean[run], x[run].var(0)), strict=True):
                        own[name].lerp_(value, MOMENTUM)
        else:
            mean, variance = (torch.stack([own[name] for own in self.buffers]) for name in names)
        scale = self._stacked(f"hidden.{layer}.norm.weight") * (variance + EPSILON).rsqrt()
        return (x - mean[:, None]) * scale[:, None] + self._stacked(f"hidden.{layer}.norm.bias")[:, None]

    def _masks(self, images: int, step: int) -> Tensor:
        """Dropout's factors [R, layers, B, h], from a run's seed and the step alone: a resumed run draws the same."""
        kept = {}
        for seed in set(self.seeds):  # runs of a grid share one: it is drawn, and copied to the device, once
            drawn = uniform(stream(seed, "dropout", step), self.hidden, images, self.width)
            kept[seed] = copied(drawn >= DROPOUT, self.backbone.device)
        return torch.stack([kept[seed] for seed in self.seeds]).float() / (1 - DROPOUT)

    def _start(self, config: TuneConfig) -> dict[str, Tensor]:
        source, width = generator(config), self.width
        start = {}
        for i in range(self.hidden):
            normal = torch.randn(width, width, generator=source, dtype=torch.float32, device="cpu")
            start[f"hidden.{i}.weight"] = normal * (2 / width) ** 0.5
            start[f"hidden.{i}.bias"] = uniform_within(width**-0.5, source, width)
            start[f"hidden.{i}.norm.weight"] = torch.ones(width, dtype=torch.float32, device="cpu")
            start[f"hidden.{i}.norm.bias"] = torch.zeros(width, dtype=torch.float32, device="cpu")
        return start


class MLP(Method):
    """k linear layers as the head; k - 1 of them are counted as parameters, with their BatchNorm.

    Args:
        k: at least 2; Table 1 has 2, 3, 5 and 9.
    """

    kind = "linear"

    def __init__(self, k: int = 3) -> None:
        if k < 2:
            raise OptionError(f"an MLP head has at least 2 layers, got {k}: one layer is Linear")
        self.k = k
        self.name = f"MLP-{k}"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        return Prepared(MLPLearner(setting.backbone, setting.num_classes, configs, self.k - 1))

    def num_parameters(self, setting: Setting) -> int:
        width = setting.backbone.width
        return (self.k - 1) * (width**2 + 3 * width)
