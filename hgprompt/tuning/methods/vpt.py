"""VPT: a prompt from a random start (Jia et al., ECCV 2022)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Prepared, Setting
from hgprompt.tuning.methods.start import Start, StartMethod, random_start

DEEP_DROPOUT = 0.1
"""Of deep prompts: VPT's on VTAB. Shallow ones have none."""


class VPT(StartMethod):
    """No transfer; shallow or deep, as the setting says."""

    name = "VPT"

    def start(self, setting: Setting, seed: int) -> Start:
        return Start(random_start(setting, seed))


class DeepVPT(VPT):
    """VPT with a prompt for every block, beside whatever the setting's pool is of."""

    name = "VPT-deep"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        own = [dataclasses.replace(config, prompt_dropout=DEEP_DROPOUT) for config in configs]
        return dataclasses.replace(super().prepare(_deep(setting), own), configs=own)

    def num_parameters(self, setting: Setting) -> int:
        """L·p·d."""
        return super().num_parameters(_deep(setting))


class FittedVPT(VPT):
    """The same under a head in closed form, which needs no source."""

    name = "VPT, fitted head"
    head = "fitted"
    revision = 1


def _deep(setting: Setting) -> Setting:
    return dataclasses.replace(setting, deep=True)
