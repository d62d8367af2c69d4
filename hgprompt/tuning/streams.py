"""Random streams of a run: one for each thing that is drawn, none of which tells anything of another."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, purpose: str, counter: int = 0) -> torch.Generator:
    """A CPU generator for one purpose ("head", "order", …) of the run with a seed.

    Two draws from generators of one bare seed would be the same numbers: a prompt and its head, say. And a generator of
    the counter (an epoch, a step) alone draws for a resumed run what the undisturbed one drew.
    """
    state = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), counter]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)  # 63 bits: what manual_seed takes on every platform


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in 0 … 1; float32 on the CPU, whatever torch's defaults are."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform_within(bound: float, generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in ±bound; float32 on the CPU."""
    return (uniform(generator, *shape) * 2 - 1) * bound
