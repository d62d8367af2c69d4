"""One pass shared by the processes that torchrun starts: each reads its own images, all get the same answer.

hgprompt train-source procedural:object-count procedural:azimuth --pool pool.safetensors
torchrun --nproc-per-node 2 --max-restarts 3 examples/torchrun_ensemble.py pool.safetensors --checkpoint-dir pass
"""

import argparse
import datetime
import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset

import hgprompt
from hgprompt.data import render_task
from hgprompt.distributed import meeting_place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", help="prompts to mix, a .safetensors file")
    parser.add_argument("--task", default="nearest-distance", help="the new task, one of hgprompt's procedural ones")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--shard", choices=("images", "prompts"), default="images")
    parser.add_argument("--checkpoint-dir", help="keep what is done here: a restart goes on from it")
    parser.add_argument("--out", default="mix", help="folder for the result")
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A rank that hangs ends the job after this time; one that dies ends it at once, and torchrun starts it anew.
    timeout = datetime.timedelta(minutes=10)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **meeting_place())
    rank, world = dist.get_rank(), dist.get_world_size()

    pool = hgprompt.PromptPool.load(arguments.pool)
    vit = hgprompt.load_backbone("mini", device="cuda" if on_gpu else "cpu")
    images = render_task(arguments.task, arguments.images, image_size=vit.image_size[0])
    if arguments.shard == "images":
        # Every world-th image. A DistributedSampler would repeat images to make the shares equal; there is no need to.
        images = Subset(images, range(rank, len(images), world))
    loader = DataLoader(images, batch_size=32)

    result = hgprompt.fast_ensemble(
        pool,
        loader,
        backbone=vit,
        process_group=dist.group.WORLD,
        shard=arguments.shard,
        progress=rank == 0,
        checkpoint_dir=arguments.checkpoint_dir,
    )
    if rank == 0:
        result.save(arguments.out)
        print(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
