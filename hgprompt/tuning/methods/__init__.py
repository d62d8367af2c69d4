"""The methods of the paper's Table 1, and the controls that a gain must be held against."""

from __future__ import annotations

import importlib
import importlib.util

from hgprompt.tuning.method import Method
from hgprompt.tuning.methods.attempt import ATTEMPT
from hgprompt.tuning.methods.controls import BestSingle, CrossEntropyWeights, EqualCompute, RandomWeights, Uniform
from hgprompt.tuning.methods.hgprompt import HGPrompt
from hgprompt.tuning.methods.panda import PANDA
from hgprompt.tuning.methods.spot import SPoT
from hgprompt.tuning.methods.vpt import VPT

_NETWORK = (
    ("linear", "Linear", ()), ("partial", "Partial", (1,)), ("mlp", "MLP", (2,)), ("mlp", "MLP", (3,)),
    ("mlp", "MLP", (5,)), ("mlp", "MLP", (9,)), ("adapter", "Adapter", ()), ("sidetune", "SideTune", ()),
    ("bias", "Bias", ()),
)  # fmt: skip


def _network_methods() -> list[Method]:
    """Those that train a head or parts of the network, as far as they are here."""
    made = []
    for module, name, arguments in _NETWORK:
        if importlib.util.find_spec(f"{__name__}.{module}") is not None:
            made.append(getattr(importlib.import_module(f"{__name__}.{module}"), name)(*arguments))
    return made


METHODS: dict[str, Method] = {m.name: m for m in (*_network_methods(), VPT(), SPoT(), ATTEMPT(), PANDA(), HGPrompt())}
"""Table 1, in its order, by name."""

CONTROLS: dict[str, Method] = {
    m.name: m for m in (Uniform(), RandomWeights(), BestSingle(), EqualCompute(), CrossEntropyWeights())
}
"""Without which no gain can be credited to α."""
