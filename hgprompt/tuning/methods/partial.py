"""PARTIAL-k: fine-tuning of the last k blocks and the final norm (Yosinski et al., 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hgprompt.errors import OptionError
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.network_learner import NetworkLearner, frozen_model


class LastBlocks(nn.Module):
    """What a timm model does from its last k blocks on: tokens [B, S, d] → features [B, h].

    Attributes:
        names: of the parameters that are trained.
    """

    def __init__(self, model: Any, k: int) -> None:
        super().__init__()
        if not 1 <= k <= len(model.blocks):
            raise OptionError(f"PARTIAL-k trains 1 to {len(model.blocks)} blocks of this backbone, got k = {k}")
        self.model = model
        self.first = len(model.blocks) - k
        # Models that pool image tokens have their final norm behind the pooling.
        trained = tuple(f"model.blocks.{i}." for i in range(self.first, len(model.blocks)))
        trained += "model.norm.", "model.fc_norm."
        self.names = [name for name, _ in self.named_parameters() if name.startswith(trained)]

    def tokens(self, images: Tensor) -> Tensor:
        """Tokens [B, S, d] before the last k blocks."""
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.blocks[: self.first](self.model.norm_pre(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(self.model.blocks[self.first :](tokens)))


class PartialLearner(NetworkLearner):
    """R runs from tokens [B, S, d], which are computed once for every image."""

    caches: ClassVar[bool] = True
    network: LastBlocks

    def prepare(self, images: Tensor) -> Tensor:
        """Tokens [B, S, d] before the blocks that are trained, float32."""
        with torch.no_grad():
            return self.network.tokens(super().prepare(images))


class Partial(Method):
    """The last k blocks and the final norm are trained, with all that is in them."""

    kind = "fine-tune"

    def __init__(self, k: int = 1) -> None:
        if k < 1:
            raise OptionError(f"PARTIAL-k trains the last k blocks, k ≥ 1, got {k}")
        self.k = k
        self.name = f"PARTIAL-{k}"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        network = LastBlocks(frozen_model(setting), self.k)
        trained = {name: network.get_parameter(name) for name in network.names}
        learner = PartialLearner(
            network, [trained] * len(configs), configs, setting.backbone, setting.num_classes, input_dims=3
        )
        return Prepared(learner)

    def num_parameters(self, setting: Setting) -> int:
        network = LastBlocks(frozen_model(setting), self.k)
        return sum(network.get_parameter(name).numel() for name in network.names)
