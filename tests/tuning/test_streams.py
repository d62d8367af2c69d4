"""Random streams: the same again for the same purpose, and nothing in common otherwise."""

from __future__ import annotations

import itertools

import torch

from hgprompt import load_backbone
from hgprompt.tuning import random_prompt
from hgprompt.tuning.learner import linear_head
from hgprompt.tuning.streams import stream

KEYS = [*itertools.product((0, 1, 42, 2**63 - 1), ("head", "order", "prompt dropout"), (0, 1, 1_000_003))]


def _draw(*key):
    return torch.rand(2000, generator=stream(*key), dtype=torch.float64) - 0.5


def test_the_same_again():
    assert torch.equal(_draw(42, "head"), _draw(42, "head", 0))


def test_seeds_purposes_and_counters_have_nothing_in_common():
    draws = torch.stack([_draw(*key) for key in KEYS])
    correlation = torch.corrcoef(draws).fill_diagonal_(0).abs()
    # Of independent draws: a deviation of 1/√2000 = 0.022; five of them for 630 pairs.
    assert float(correlation.max()) < 5 / 2000**0.5


def test_a_runs_prompt_and_head_have_nothing_in_common():
    vit = load_backbone("mini", device="cpu")
    prompt = random_prompt(vit, 10, seed=42).flatten()[: 9 * vit.width]
    head = linear_head(vit.width, 9, 42, vit.device)["head.weight"].detach().flatten()
    assert abs(float(torch.corrcoef(torch.stack([prompt, head]))[0, 1])) < 5 / len(head) ** 0.5
