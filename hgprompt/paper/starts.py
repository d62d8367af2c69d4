"""Where tuning starts from: mixtures of source prompts by every rule that the paper's experiments compare.

A rule looks at the training images of the target alone, and says α over the sources; the start is Σ α_i P_i (Eq. 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.data import LabelledImages
from hgprompt.ensemble import fast_ensemble
from hgprompt.pool import PromptPool
from hgprompt.progress import Reporter

MAX_IMAGES = 2000
"""Of the target, to weigh the sources with: the paper's number."""


@dataclass(frozen=True)
class Weighing:
    """A rule for α.

    Attributes:
        rule: "uniform"; "single": all of the source with the largest H; "hgprompt": Eq. 12 with lam.
        lam: λ of Eq. 12; 0: the H-score alone.
    """

    rule: Literal["uniform", "single", "hgprompt"]
    lam: float = 1.0


@dataclass(frozen=True, eq=False)
class Mixed:
    """A start.

    Attributes:
        prompt: Σ α_i P_i [p, d] (deep: [L, p, d]). report: JSON-able; weights {name: α}, and what else is known.
    """

    prompt: Tensor
    report: dict[str, Any] = field(default_factory=dict)


def mix(
    backbone: FrozenViT, pool: PromptPool, images: LabelledImages, weighing: Weighing, *, seed: int, report: Reporter
) -> Mixed:
    """The start that a rule makes of a pool for a target's training images."""
    names = pool.names
    if weighing.rule == "uniform":
        return _of(pool, torch.full((len(pool),), 1 / len(pool), dtype=torch.float64), {})
    chosen = images.subset(torch.arange(min(MAX_IMAGES, len(images))))
    lam = weighing.lam if weighing.rule == "hgprompt" else 0.0
    found = fast_ensemble(
        pool, chosen.batches(64), backbone=backbone, lam=lam, seed=seed, progress=report,
        gradient_images=None if lam else 0,
    )  # fmt: skip
    known = {
        "h_score": found.h_score,
        "uniform_h_score": found.uniform_h_score,
        "source_h_scores": dict(zip(names, found.source_h_scores.tolist(), strict=True)),
    }
    if weighing.rule == "single":
        best = int(found.source_h_scores.argmax())
        return _of(pool, torch.nn.functional.one_hot(torch.tensor(best), len(pool)).double(), known)
    known |= {
        "alignment_loss": found.alignment_loss,
        "weight_std": dict(zip(names, found.weight_std.tolist(), strict=True)),
        "gradient_cosines": found.gradient_cosines.tolist(),
    }
    return _of(pool, found.weights, known)


def _of(pool: PromptPool, weights: Tensor, known: dict[str, Any]) -> Mixed:
    stack = pool.stack()
    prompt = torch.tensordot(weights, stack.double(), dims=1).to(stack.dtype)
    return Mixed(prompt, {"weights": dict(zip(pool.names, weights.tolist(), strict=True)), **known})
