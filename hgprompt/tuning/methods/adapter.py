"""Adapter: a bottleneck after the feed-forward part of every block (Houlsby et al., 2019; Pfeiffer et al., 2020)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hgprompt.errors import OptionError
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.network_learner import NetworkLearner, frozen_model, generator

HOULSBY_STD = 0.01
"""Of the normal distribution, cut at two deviations, that Houlsby's weights are drawn from."""


class Bottleneck(nn.Module):
    """x + Up(GELU(Down x)), of x [..., d], with d → hidden → d. All weights are zero until they are set."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))


class Adapter(Method):
    """A bottleneck of width d / reduction on what each block's feed-forward part adds to the residual stream.

    Args:
        reduction: r; VPT searches 8, 64 and 256.
        init: "houlsby": small normal weights, biases zero. "vpt": all zero, as in VPT's code. That is a point where
            the gradient of all weights is zero, and stays so: no weight ever moves, and what is trained is one bias
            vector per block. The default is therefore "houlsby", which is what the name promises.
    """

    name = "Adapter"
    kind = "fine-tune"

    def __init__(self, reduction: int = 8, init: Literal["houlsby", "vpt"] = "houlsby") -> None:
        if reduction < 1:
            raise OptionError(f"reduction must be at least 1, got {reduction}")
        if init not in ("houlsby", "vpt"):
            raise OptionError(f"init must be 'houlsby' or 'vpt', got {init!r}")
        self.reduction, self.init = reduction, init

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        model = frozen_model(setting)
        hidden = self._hidden(setting)
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws weights, to be replaced, from the global generator
            for block in model.blocks:
                adapter = Bottleneck(setting.backbone.width, hidden).to(setting.backbone.device).requires_grad_(False)
                # Behind the LayerScale, where a block has one: what the bottleneck reads is what is added.
                block.ls2 = nn.Sequential(OrderedDict(scale=block.ls2, adapter=adapter)).eval()
        trained = [self._start(model, config) for config in configs]
        return Prepared(NetworkLearner(model, trained, configs, setting.backbone, setting.num_classes))

    def num_parameters(self, setting: Setting) -> int:
        width, hidden = setting.backbone.width, self._hidden(setting)
        return setting.backbone.depth * (2 * width * hidden + hidden + width)

    def _hidden(self, setting: Setting) -> int:
        width = setting.backbone.width
        if self.reduction > width:
            raise OptionError(f"reduction {self.reduction} leaves nothing of this backbone's width {width}")
        return width // self.reduction

    def _start(self, model: Any, config: TuneConfig) -> dict[str, Tensor]:
        source = generator(config)
        start = {}
        for name, value in model.named_parameters():
            if ".adapter." in name:
                start[name] = torch.zeros(value.shape, dtype=torch.float32, device="cpu")
                if self.init == "houlsby" and value.ndim == 2:
                    cut = 2 * HOULSBY_STD
                    nn.init.trunc_normal_(start[name], std=HOULSBY_STD, a=-cut, b=cut, generator=source)
                start[name] = start[name].to(value.device)
        return start
