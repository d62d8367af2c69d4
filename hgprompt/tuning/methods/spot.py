"""SPoT: start from the sources that are most like an early prompt of the target (Vu et al., ACL 2022)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from hgprompt.errors import OptionError
from hgprompt.tuning.method import Setting
from hgprompt.tuning.methods.start import Start, StartMethod, early_prompt, mixture, named, sources

Similarity = Literal["average", "pairs"]


class SPoT(StartMethod):
    """Start from the most similar source, or from a mixture of some.

    Args:
        top: sources to take: 1 is the most similar alone; more are weighted by their similarities.
        epochs: of the early target prompt.
        similarity: cosine of the average tokens, or the average cosine of all pairs of tokens.
    """

    name = "SPoT"
    uses_pool = True

    def __init__(self, top: int = 1, epochs: int = 2, similarity: Similarity = "average") -> None:
        if top < 1 or epochs < 1 or similarity not in ("average", "pairs"):
            raise OptionError(f"SPoT takes top and epochs of at least 1 and 'average' or 'pairs', got {similarity!r}")
        self.top, self.epochs, self.similarity = top, epochs, similarity

    def start(self, setting: Setting, seed: int) -> Start:
        pool = sources(setting)
        early, cost = early_prompt(setting, seed, self.epochs)
        similar = similarities(pool.stack(), early, self.similarity)
        weights = top_weights(similar, self.top)
        report = {"similarities": named(pool, similar), "weights": named(pool, weights)}
        return Start(mixture(pool, weights), cost, report)


def similarities(prompts: Tensor, target: Tensor, kind: Similarity = "average") -> Tensor:
    """Cosines [M] in float64 of prompts [M, p, d] and a target [p, d]; a deep prompt's layers stand side by side."""
    tokens, own = _tokens(prompts), _tokens(target[None])
    if kind == "average":
        return cosine_similarity(tokens.mean(1), own.mean(1), dim=1)
    # The mean of all pairs of cosines is the product of the mean unit tokens.
    return (normalize(tokens, dim=2).mean(1) * normalize(own, dim=2).mean(1)).sum(1)


def _tokens(prompts: Tensor) -> Tensor:
    """[M, p, d], or [M, p, L·d] of deep prompts [M, L, p, d]; float64."""
    return prompts.double() if prompts.ndim == 3 else prompts.double().transpose(1, 2).flatten(2)


def top_weights(similar: Tensor, top: int) -> Tensor:
    """α [M]: the `top` most similar sources, in proportion to their similarity, negative ones clamped at 0. Where none
    is positive, the most similar source alone."""
    chosen = similar.argsort(descending=True, stable=True)[:top]
    kept = similar[chosen].clamp_min(0)
    if top == 1 or kept.sum() == 0:
        chosen, kept = chosen[:1], torch.ones(1, dtype=similar.dtype, device="cpu")
    return torch.zeros_like(similar).index_copy(0, chosen, kept / kept.sum())
