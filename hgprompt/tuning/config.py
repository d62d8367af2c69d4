"""TuneConfig: how a prompt is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hgprompt.arguments import real, whole
from hgprompt.errors import OptionError

MAX_RATE = 1e6
"""Of learning rates and weight decay: beyond, float32 overflows in a step."""

_KINDS: dict[str, Callable[[str, Any], float]] = {
    "epochs": whole, "batch_size": whole, "seed": whole, "lr": real, "head_lr": real, "weight_decay": real,
    "warmup": real, "prompt_dropout": real,
}  # fmt: skip


Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class TuneConfig:
    """How a prompt and its head are tuned; the defaults are VPT's recipe.

    Attributes:
        epochs: passes over the training images. batch_size: images per step.
        optimizer: "sgd" (momentum 0.9) or "adamw".
        lr: base learning rate of the prompt; the rate is lr · batch_size / 256, as VPT scales it. head_lr: of the
            linear head; None: the same.
        weight_decay: of prompt and head.
        warmup: share of all steps in which the rate rises linearly; then it falls to 0 as a cosine.
        prompt_dropout: share of prompt elements that are zeroed in a step (the same for all images of the step; VPT
            draws them per image).
        seed: of the head's start, the order of the images and the dropout.
    """

    epochs: int = 100
    batch_size: int = 64
    optimizer: Optimizer = "sgd"
    lr: float = 1.0
    head_lr: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.1
    prompt_dropout: float = 0.0
    seed: int = 42

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if name != "head_lr" or value is not None:
                object.__setattr__(self, name, kind(name, value))  # NumPy's numbers become Python's
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            if value < 1:
                raise OptionError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.optimizer not in ("sgd", "adamw"):
            raise OptionError(f"optimizer must be 'sgd' or 'adamw', got {self.optimizer!r}")
        for name in ("lr", "head_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_RATE:
                raise OptionError(f"{name} must be a number from 0 to {MAX_RATE:g}, got {value!r}")
        for name in ("warmup", "prompt_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise OptionError(f"{name} must be in [0, 1), got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise OptionError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")

    def rate(self, step: int, steps: int) -> float:
        """Factor of the learning rate at step 0 … steps-1: linear warm-up, then a cosine to 0."""
        rising = int(self.warmup * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
