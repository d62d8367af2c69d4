"""Commands that torchrun starts several times share their work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple


class Job(NamedTuple):
    """This process among those of its job. group: theirs; None: this one alone. rank, world: as torchrun says."""

    group: Any = None
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0


@contextlib.contextmanager
def job(device: str | None) -> Iterator[Job]:
    """The processes that torchrun started (RANK, WORLD_SIZE), joined in a group: NCCL on GPUs, one each; else gloo.

    Raises:
        OptionError: RANK and WORLD_SIZE say something else than a rank.
    """
    import torch
    import torch.distributed as dist

    from hgprompt.distributed import meeting_place, place_in_job

    rank, world = place_in_job()
    if world == 1:
        yield Job()
        return
    gpu = None if (device or "cuda").startswith("cpu") else own_gpu()
    on_gpu = gpu is not None
    if on_gpu:
        torch.cuda.set_device(gpu)
    dist.init_process_group("nccl" if on_gpu else "gloo", **meeting_place())
    yield Job(dist.group.WORLD, rank, world)
    dist.destroy_process_group()  # not after an error: other ranks may never come to it


def own_gpu() -> str | None:
    """The GPU of this process among those that torchrun started on this machine; None without a GPU or torchrun."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("RANK"))
    if local is None or not torch.cuda.is_available():
        return None
    return f"cuda:{int(local) % torch.cuda.device_count()}"
