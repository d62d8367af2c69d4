"""Images spread over ranks give the answer of one process, and the same bits on every rank."""

from __future__ import annotations

import literal
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hgprompt import EnsembleStatistics, fast_ensemble
from hgprompt.errors import DistributedError


def _problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randn(30, 3, 16, 16, generator=g, dtype=torch.float64) + labels[:, None, None, None]
    return literal.tiny_vit().double(), torch.randn(3, 2, 16, generator=g, dtype=torch.float64), images, labels


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, prompts, images, labels = _problem()
    share = slice(0, 22) if rank == 0 else slice(22, 30) if rank == 1 else slice(30, 30)  # uneven, one empty
    batch = [(images[share], labels[share])] if len(labels[share]) else []
    result = fast_ensemble(prompts, batch, backbone=model, process_group=dist.group.WORLD, folds=1)
    torch.save((result.weights, result.gradient_cosines, result.n_images), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_process(tmp_path):
    mp.spawn(_rank, (3, str(tmp_path)), nprocs=3)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)]
    for weights, cosines, count in parts:
        assert torch.equal(weights, parts[0][0])
        assert torch.equal(cosines, parts[0][1])
        assert count == 30
    model, prompts, images, labels = _problem()
    alone = fast_ensemble(prompts, [(images, labels)], backbone=model, folds=1)
    torch.testing.assert_close(parts[0][0], alone.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts[0][1], alone.gradient_cosines, rtol=0, atol=1e-8)


def test_all_reduce_needs_a_group():
    with pytest.raises(DistributedError, match="process group"):
        EnsembleStatistics().all_reduce()
