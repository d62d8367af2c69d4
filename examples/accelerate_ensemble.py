"""Accelerate: mix the start of a prompt on the training images of all processes, then tune from it.

hgprompt train-source procedural:object-count procedural:azimuth --pool pool.safetensors
accelerate launch --num_processes 2 examples/accelerate_ensemble.py pool.safetensors
"""

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader

import hgprompt
from hgprompt.data import render_task


class Classifier(nn.Module):
    """A frozen backbone under one prompt, and a linear head."""

    def __init__(self, vit: hgprompt.FrozenViT, start: torch.Tensor, num_classes: int) -> None:
        super().__init__()
        self.encoder = hgprompt.MultiPromptEncoder(vit, start[None])
        self.head = nn.Linear(vit.width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", help="prompts to mix, a .safetensors file")
    parser.add_argument("--task", default="nearest-distance", help="the new task, one of hgprompt's procedural ones")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()

    # even_batches would repeat images to give every process as many: in the mixture they would count twice.
    uneven = DataLoaderConfiguration(even_batches=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=uneven)
    set_seed(42)
    pool = hgprompt.PromptPool.load(arguments.pool)
    vit = hgprompt.load_backbone("mini", device=accelerator.device)
    images = render_task(arguments.task, arguments.images, image_size=vit.image_size[0])

    in_order = accelerator.prepare(DataLoader(images, batch_size=16))
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    result = hgprompt.fast_ensemble(pool, in_order, backbone=vit, process_group=group)
    accelerator.print(result)

    model = Classifier(vit, result.prompt, images.num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shuffled = DataLoader(images, batch_size=16, shuffle=True, drop_last=True)
    model, optimizer, shuffled = accelerator.prepare(model, optimizer, shuffled)
    with accelerator.join_uneven_inputs([model]):
        for epoch in range(arguments.epochs):
            for batch, labels in shuffled:
                loss = nn.functional.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
