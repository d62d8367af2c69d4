"""Tuning a prompt and a linear head on a labelled task (VPT), from a random start or from other tasks' prompts."""

from hgprompt.tuning.compare import Comparison, compare_starts
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.head import fitted_head
from hgprompt.tuning.prompts import PromptLearner, evaluate, tune
from hgprompt.tuning.result import TuneResult
from hgprompt.tuning.start import random_prompt
from hgprompt.tuning.trainer import Trained, accuracy, train

__all__ = [
    "Comparison",
    "PromptLearner",
    "Trained",
    "TuneConfig",
    "TuneResult",
    "accuracy",
    "compare_starts",
    "evaluate",
    "fitted_head",
    "random_prompt",
    "train",
    "tune",
]
