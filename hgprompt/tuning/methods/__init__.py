"""The methods of the paper's Table 1, and the controls that a gain must be held against."""

from hgprompt.tuning.method import Method
from hgprompt.tuning.methods.adapter import Adapter
from hgprompt.tuning.methods.attempt import ATTEMPT
from hgprompt.tuning.methods.bias import Bias
from hgprompt.tuning.methods.controls import (
    BestSingle,
    CrossEntropyWeights,
    EqualCompute,
    FittedUniform,
    RandomWeights,
    Uniform,
)
from hgprompt.tuning.methods.hgprompt import (
    BestSingleByH,
    FittedBestSingleByH,
    FittedHGPrompt,
    HGPrompt,
    PaperHGPrompt,
    RawHGPrompt,
)
from hgprompt.tuning.methods.linear import FittedLinear, Linear
from hgprompt.tuning.methods.mlp import MLP
from hgprompt.tuning.methods.panda import PANDA
from hgprompt.tuning.methods.partial import Partial
from hgprompt.tuning.methods.sidetune import SideTune
from hgprompt.tuning.methods.spot import SPoT
from hgprompt.tuning.methods.vpt import VPT, DeepVPT, FittedVPT

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Linear(), Partial(1), MLP(2), MLP(3), MLP(5), MLP(9), Adapter(), SideTune(), Bias(), VPT(), DeepVPT(), SPoT(),
        ATTEMPT(), PANDA(), HGPrompt(),
    )
}  # fmt: skip
"""Table 1, in its order, by name; VPT deep as well, which the paper does not print."""

CONTROLS: dict[str, Method] = {
    m.name: m
    for m in (
        RawHGPrompt(), PaperHGPrompt(), Uniform(), RandomWeights(), BestSingle(), BestSingleByH(), EqualCompute(),
        CrossEntropyWeights(), FittedHGPrompt(), FittedUniform(), FittedBestSingleByH(), FittedVPT(), FittedLinear(),
    )
}  # fmt: skip
"""Eq. 12 with the paper's own λ, and Algorithm 1 to the letter; those without which no gain can be credited to α;
heads that start in closed form."""

__all__ = [
    "ATTEMPT",
    "CONTROLS",
    "METHODS",
    "MLP",
    "PANDA",
    "VPT",
    "Adapter",
    "BestSingle",
    "BestSingleByH",
    "Bias",
    "CrossEntropyWeights",
    "DeepVPT",
    "EqualCompute",
    "FittedBestSingleByH",
    "FittedHGPrompt",
    "FittedLinear",
    "FittedUniform",
    "FittedVPT",
    "HGPrompt",
    "Linear",
    "PaperHGPrompt",
    "Partial",
    "RandomWeights",
    "RawHGPrompt",
    "SPoT",
    "SideTune",
    "Uniform",
]
