"""What else can be asked of prompts: transferability metrics beside the H-score, and alternatives to Eq. 10."""

from hgprompt.transferability.alternatives import (
    CrossFoldAlignment,
    Entropy,
    FisherMatching,
    GradientVariance,
    MinNorm,
    TargetAlignment,
    TraceRatio,
    top_k,
)
from hgprompt.transferability.metrics import leep, log_me, nce, trace_ratio, transrate

__all__ = [
    "CrossFoldAlignment",
    "Entropy",
    "FisherMatching",
    "GradientVariance",
    "MinNorm",
    "TargetAlignment",
    "TraceRatio",
    "leep",
    "log_me",
    "nce",
    "top_k",
    "trace_ratio",
    "transrate",
]
