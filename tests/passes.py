"""Small passes that are interrupted, for the tests of their checkpoints."""

from __future__ import annotations

import literal
import pytest
import torch

from hgprompt.backbone import FrozenViT
from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import DataError

N, BATCH, C, M, FILE = 90, 6, 3, 3, "pass.safetensors"
QUICK = {"folds": 3, "starts": 1, "max_steps": 5}


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (N,), generator=g)
    return torch.randn(N, 3, 16, 16, generator=g) + torch.randn(C, 3, 1, 1, generator=g)[labels], labels


def prompts(seed=5):
    return torch.randn(M, 2, 16, generator=torch.Generator().manual_seed(seed))


def batches(size=BATCH, images=None, labels=None):
    images, labels = data() if images is None else (images, labels)
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, N, size)]


def head(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(16, C)


VIT = FrozenViT.from_timm(literal.tiny_vit())


def run(loader, folder=None, **options):
    options = {"backbone": VIT, "checkpoint_every": 0.0} | QUICK | options
    return fast_ensemble(options.pop("prompts", prompts()), loader, checkpoint_dir=folder, **options)


class Until:
    """A loader that fails after so many batches; with a length, as the whole one has."""

    def __init__(self, batch, error=None, own=None):
        self.batches, self.batch = own or batches(), batch
        self.error = error or ValueError("the disk is gone")

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        yield from self.batches[: self.batch]
        raise self.error


def interrupt(folder, batch=4, **options):
    with pytest.raises(DataError, match="the disk is gone"):
        run(Until(batch), folder, **options)


def assert_same_bits(result, expected):
    for name in ("weights", "prompt", "weight_std", "gradient_cosines", "source_h_scores"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    for name in ("h_score", "alignment_loss", "objective", "n_images", "n_gradient_images", "sample_h_score"):
        assert float(getattr(result, name)).hex() == float(getattr(expected, name)).hex(), name  # NaN is NaN
