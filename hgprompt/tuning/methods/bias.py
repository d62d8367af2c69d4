"""BIAS: every bias of the network is trained, and nothing else of it (Cai et al., 2020; Ben Zaken et al., 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.network_learner import NetworkLearner, frozen_model


class Bias(Method):
    """Every parameter named bias: of linear layers, LayerNorms and the patch embedding."""

    name = "BIAS"
    kind = "fine-tune"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        model = frozen_model(setting)
        trained = _biases(model)
        return Prepared(NetworkLearner(model, [trained] * len(configs), configs, setting.backbone, setting.num_classes))

    def num_parameters(self, setting: Setting) -> int:
        return sum(value.numel() for value in _biases(frozen_model(setting)).values())


def _biases(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if name.split(".")[-1] == "bias"}
