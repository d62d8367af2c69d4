"""hgprompt: how much of each visual prompt to take for a new task, in one pass over its images.

result = hgprompt.fast_ensemble(prompts, loader)
"""

import logging as _logging

from hgprompt import transferability
from hgprompt.backbone import FrozenViT
from hgprompt.bundled import load_backbone
from hgprompt.encoder import MultiPromptEncoder, encode
from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import (
    BackboneError,
    DataError,
    DeviceMemoryError,
    DistributedError,
    FileFormatError,
    HGPromptError,
    HGPromptWarning,
    OptionError,
    OutputError,
    PromptError,
    StatisticsError,
)
from hgprompt.memory import Footprint, footprint
from hgprompt.objective import alignment_loss, gram_of, h_score
from hgprompt.optimize import Diagnostics, Solution, WeightProblem, optimize_weights
from hgprompt.pool import BackboneInfo, PromptPool
from hgprompt.result import EnsembleResult
from hgprompt.selection import Selection, select_prompts
from hgprompt.statistics import EnsembleStatistics

__version__ = "0.1.0"

__all__ = [
    "BackboneError",
    "BackboneInfo",
    "DataError",
    "DeviceMemoryError",
    "Diagnostics",
    "DistributedError",
    "EnsembleResult",
    "EnsembleStatistics",
    "FileFormatError",
    "Footprint",
    "FrozenViT",
    "HGPromptError",
    "HGPromptWarning",
    "MultiPromptEncoder",
    "OptionError",
    "OutputError",
    "PromptError",
    "PromptPool",
    "Selection",
    "Solution",
    "StatisticsError",
    "WeightProblem",
    "alignment_loss",
    "encode",
    "fast_ensemble",
    "footprint",
    "gram_of",
    "h_score",
    "load_backbone",
    "optimize_weights",
    "select_prompts",
    "transferability",
]

_logging.getLogger(__name__).addHandler(_logging.NullHandler())
