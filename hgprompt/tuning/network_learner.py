"""NetworkLearner: runs that train parts of a network of modules, each run its own copies of these parts alone.

One frozen network serves all runs; `torch.func.functional_call` puts a run's tensors in their places. Memory is the
network, R times what is trained, and the activations of one run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from hgprompt.backbone import FrozenViT
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.learner import HEAD, Learner, cross_entropies, linear_head, on_host
from hgprompt.tuning.method import Setting
from hgprompt.tuning.streams import stream


class NetworkLearner(Learner):
    """R runs of a network whose features a linear head reads.

    Args:
        network: frozen, in eval mode, inputs [B, ...] → features [B, h]; it is never changed.
        trained: for each run, {name of a parameter of the network: its first value}; the values are copied.
        configs: of the runs; their seeds draw the heads.
        backbone: normalises the images, and says where all this lies.
        input_dims: dimensions of inputs [B, ...]; where there is one more, each run has its own.
    """

    def __init__(
        self,
        network: nn.Module,
        trained: Iterable[Mapping[str, Tensor]],
        configs: Sequence[TuneConfig],
        backbone: FrozenViT,
        num_classes: int,
        *,
        input_dims: int = 4,
    ) -> None:
        self.network, self.backbone, self.input_dims = network, backbone, input_dims
        self.parameters = [
            {name: value.detach().clone().requires_grad_() for name, value in values.items()}
            | linear_head(backbone.width, num_classes, config.seed, backbone.device)
            for values, config in zip(trained, configs, strict=True)
        ]

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised as the backbone's are, in float32."""
        return self.backbone.prepare(images).float()

    def features(self, run: int, inputs: Tensor) -> Tensor:
        """Features [B, h] of inputs [B, ...] in one run."""
        named = self.parameters[run].items()
        return functional_call(self.network, {k: v for k, v in named if not k.startswith(HEAD)}, (inputs,))

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        return torch.stack([self._logits(run, each) for run, each in enumerate(self._of_each_run(inputs))])

    def backward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        runs = zip(self._of_each_run(inputs), labels.expand(len(self.parameters), -1), strict=True)
        losses, right = [], []
        for run, (each, answers) in enumerate(runs):
            # One run after the other: the activations of all of them at once would not fit.
            loss, correct = cross_entropies(self._logits(run, each)[None], answers)
            (loss.sum() / len(each)).backward()
            losses.append(loss.detach())
            right.append(correct)
        return on_host(torch.cat(losses), torch.cat(right))

    def _logits(self, run: int, inputs: Tensor) -> Tensor:
        own = self.parameters[run]
        return linear(self.features(run, inputs), own[f"{HEAD}.weight"], own[f"{HEAD}.bias"])

    def _of_each_run(self, inputs: Tensor) -> list[Tensor]:
        return list(inputs) if inputs.ndim > self.input_dims else [inputs] * len(self.parameters)


def frozen_model(setting: Setting) -> Any:
    """The setting's timm model, a copy without its classifier: images [B, 3, H, W] → features [B, h], in eval mode."""
    model: Any = copy.deepcopy(setting.model()).to(setting.backbone.device, torch.float32)
    model.reset_classifier(0)
    return model.eval().requires_grad_(False)


def generator(config: TuneConfig) -> torch.Generator:
    """For a run's first values beside its head."""
    return stream(config.seed, "layers")
