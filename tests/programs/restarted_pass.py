"""A pass on the ranks of torchrun, one of which is killed in its first attempt: python restarted_pass.py POOL FOLDER

Writes into FOLDER what came out, and which batches each rank put through the network in the second attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import hgprompt
import hgprompt.one_pass
from hgprompt.data import render_task
from hgprompt.distributed import meeting_place

IMAGES, BATCH, KILLED_AT = 80, 8, 3


def main() -> None:
    pool, folder = hgprompt.PromptPool.load(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", **meeting_place())
    rank, world = dist.get_rank(), dist.get_world_size()
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    images = render_task("nearest-distance", IMAGES, image_size=64)
    batches = list(images.subset(torch.arange(rank, IMAGES, world)).batches(BATCH))

    def loader():
        for number, batch in enumerate(batches):
            if first and rank == 1 and number == KILLED_AT:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    encoded = 0
    encode = hgprompt.one_pass.encode

    def counted(vit, prompts, *arguments, **options):
        nonlocal encoded
        encoded += len(prompts) == len(pool)  # and not the mixed prompt
        return encode(vit, prompts, *arguments, **options)

    hgprompt.one_pass.encode = counted
    result = hgprompt.fast_ensemble(
        pool, loader(), backbone="mini", process_group=dist.group.WORLD, checkpoint_dir=folder / "pass",
        checkpoint_every=0.0,
    )  # fmt: skip
    (folder / f"encoded-{rank}").write_text(f"{encoded} {len(batches)}")
    if rank == 0:
        result.save(folder / "mix")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
