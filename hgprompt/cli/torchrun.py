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
    from hgprompt.paper.cells import Share

    share = Share.of_environment()
    if share.world == 1:
        yield Job()
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() and not (device or "cuda").startswith("cpu")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", share.rank)))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    yield Job(dist.group.WORLD, share.rank, share.world)
    dist.destroy_process_group()  # not after an error: other ranks may never come to it
