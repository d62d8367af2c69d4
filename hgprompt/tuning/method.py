"""Method: a row of Table 1. Setting: the task that methods are compared on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from hgprompt.backbone import FrozenViT
from hgprompt.data.images import LabelledImages
from hgprompt.pool import PromptPool
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.learner import Learner


@dataclass(frozen=True, eq=False)
class Setting:
    """What every method gets of a task.

    Attributes:
        backbone: the frozen network. model: makes the same network as a timm model in float32, for methods that train
            parts of it.
        train: training images; what a method needs to know of the task it learns from these alone.
        num_classes: C. num_tokens: p of a prompt. deep: a prompt for every block.
        pool: source prompts, without the target's own (but for Fig. 4, which asks for it); None for methods that need
            none.
    """

    backbone: FrozenViT
    model: Callable[[], nn.Module]
    train: LabelledImages
    num_classes: int
    num_tokens: int = 50
    deep: bool = False
    pool: PromptPool | None = None


@dataclass(frozen=True)
class Cost:
    """Work beside the tuning itself, in images × prompts that go through the network.

    Attributes:
        forward: without a gradient. backward: forward and backward.
    """

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def epochs(self, images: int) -> float:
        """The same work as epochs of tuning one prompt on so many images, each of which goes forward and backward."""
        return (self.backward + self.forward / (1 + BACKWARD)) / images


BACKWARD = 47.6 / 44.2
"""A backward pass to the prompts, in forward passes: operations of a ViT-B/16 with 50 prompt tokens."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Runs ready to be trained.

    Attributes:
        learner: of the runs. cost: what it took to make it, for all runs together.
        report: what to tell of it, JSON-able (weights α, similarities).
        configs: the runs' configs where the method changes them (its own warm-up, more epochs); None: as they were.
    """

    learner: Learner
    cost: Cost = field(default_factory=Cost)
    report: dict[str, object] = field(default_factory=dict)
    configs: Sequence[TuneConfig] | None = None


class Method(ABC):
    """One way to use a frozen ViT on a new task.

    Attributes:
        name: as the paper's Table 1 prints it. kind: which grid of `protocol.GRIDS` it takes: "prompt", "linear" or
            "fine-tune". uses_pool: whether it needs source prompts. runs_at_once: as many runs as should train side by
            side, for memory's sake; None: as many as are usual for its kind. revision: raised where the same options
            give other numbers than before, so that a table does not mix them.
    """

    name: str
    kind: ClassVar[str]
    uses_pool: ClassVar[bool] = False
    runs_at_once: ClassVar[int | None] = None
    revision: ClassVar[int] = 0

    @abstractmethod
    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        """R runs, one for each config (they differ in rates, weight decay and seed)."""

    @abstractmethod
    def num_parameters(self, setting: Setting) -> int:
        """Trained numbers beside the head, by formula."""


def identified(method: Method) -> dict[str, Any]:
    """JSON-able: a method's part in the identity of a result: what it is, how it was made, and its revision."""
    return {"method": _options_of(method)} | ({"revision": method.revision} if method.revision else {})


def _options_of(method: Method) -> dict[str, Any]:
    made = {k: _options_of(v) if isinstance(v, Method) else v for k, v in vars(method).items()}
    return {"class": type(method).__name__, **made}
