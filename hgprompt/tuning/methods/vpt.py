"""VPT: a prompt from a random start (Jia et al., ECCV 2022). Shallow or deep, as the setting says."""

from __future__ import annotations

from hgprompt.tuning.method import Setting
from hgprompt.tuning.methods.start import Start, StartMethod, random_start


class VPT(StartMethod):
    """No transfer."""

    name = "VPT"

    def start(self, setting: Setting, seed: int) -> Start:
        return Start(random_start(setting, seed))


class FittedVPT(VPT):
    """The same under a head in closed form, which needs no source."""

    name = "VPT, fitted head"
    head = "fitted"
    revision = 1
