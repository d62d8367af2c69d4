"""The options of `fast_ensemble`, checked once; and what of a pass depends on which of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hgprompt.arguments import real, whole
from hgprompt.encoder import Impl, MicroBatch
from hgprompt.errors import OptionError
from hgprompt.memory import Keep
from hgprompt.objective import Shrinkage
from hgprompt.optimize import Solver, check_lam, check_problem
from hgprompt.stopping import StopRule
from hgprompt.task_loss import FITTED, Head


@dataclass(kw_only=True)
class Options:
    """`fast_ensemble`'s arguments of these names; what the preset decides is put in their place.

    Raises:
        OptionError: one of them is of the wrong kind, out of its range, or does not go with another.
    """

    lam: float
    shrinkage: Shrinkage
    seed: int
    shard: Literal["images", "prompts"]
    head: Head
    gradient_images: int | None
    folds: int
    preset: Literal["paper"] | None
    normalize: bool
    solver: Solver
    starts: int
    tolerance: float | None
    gap_tolerance: float
    max_steps: int | None
    learning_rate: float
    keep: Keep
    max_bytes: int | None
    micro_batch: int | None
    impl: Impl

    def __post_init__(self) -> None:
        if self.preset == "paper":
            self.shrinkage, self.normalize, self.starts = 0.0, False, 1
            self.gradient_images, self.solver = None, "projected-gradient"
        elif self.preset is not None:
            raise OptionError(f"preset must be None or 'paper', got {self.preset!r}")
        if self.max_steps is None:
            self.max_steps = 200 if self.preset is None else 1000
        for name in ("lam", "gap_tolerance", "learning_rate", "tolerance"):
            self._convert(name, real)
        for name in ("seed", "folds", "starts", "max_steps", "gradient_images", "micro_batch"):
            self._convert(name, whole)
        if not isinstance(self.shrinkage, str):
            self._convert("shrinkage", real)
        check_lam(self.lam)
        check_problem(
            self.shrinkage, self.solver, self.starts, self.gap_tolerance, self.max_steps, self.learning_rate, self.seed
        )
        if self.shard not in ("images", "prompts"):
            raise OptionError(f"shard must be 'images' or 'prompts', got {self.shard!r}")
        if self.folds < 1:
            raise OptionError(f"folds must be at least 1, got {self.folds}")
        MicroBatch(self.micro_batch)  # which refuses a size below 1
        if self.tolerance is not None:
            StopRule(self.tolerance, self.folds)  # which knows what goes with what
        if self.fitted and self.head not in FITTED:
            raise OptionError(f"head must be one of {', '.join(map(repr, FITTED))}, or your own; got {self.head!r}")
        if self.gradient_images is not None and self.gradient_images < 0:
            raise OptionError(f"gradient_images must be at least 0, got {self.gradient_images}")
        if self.gradient_images == 0 and self.lam > 0 and self.fitted:
            raise OptionError("gradient_images=0 leaves nothing to align: set lam=0 as well, or let it have images")

    def _convert(self, name: str, to: Any) -> None:
        value = getattr(self, name)
        setattr(self, name, None if value is None and name in _MAY_BE_NONE else to(name, value))

    @property
    def fitted(self) -> bool:
        """Whether the head is one in closed form, and not the caller's."""
        return isinstance(self.head, str)

    @property
    def solving(self) -> dict[str, Any]:
        """Arguments of `WeightProblem`."""
        return {
            "shrinkage": self.shrinkage, "normalize": self.normalize, "solver": self.solver, "starts": self.starts,
            "tolerance": self.gap_tolerance, "max_steps": self.max_steps, "learning_rate": self.learning_rate,
            "seed": self.seed,
        }  # fmt: skip

    @property
    def deciding(self) -> dict[str, Any]:
        """All but λ that α depends on, JSON-able: what a result records, and ranks must agree on."""
        return self.solving | {
            "tolerance": self.tolerance, "gap_tolerance": self.gap_tolerance, "folds": self.folds,
            "gradient_images": self.gradient_images, "preset": self.preset,
            "head": self.head if self.fitted else "given",
        }  # fmt: skip

    @property
    def gathering(self) -> dict[str, Any]:
        """What the content of an unfinished pass depends on, JSON-able."""
        stream = {
            "folds": self.folds, "keep": self.keep, "gradient_images": self.gradient_images, "seed": self.seed,
            "impl": self.impl, "micro_batch": self.micro_batch, "tolerance": self.tolerance,
        }  # fmt: skip
        if self.tolerance is None:
            return stream
        # Where the stream ends hangs on the weights.
        return self.solving | {"lam": self.lam, "gap_tolerance": self.gap_tolerance} | stream


_MAY_BE_NONE = ("tolerance", "gradient_images", "micro_batch")
