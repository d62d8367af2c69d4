"""Lightning: a callback that mixes the start of a prompt before training, and looks again after every epoch.

hgprompt train-source procedural:object-count procedural:azimuth --pool pool.safetensors
python examples/lightning_callback.py pool.safetensors --devices 2
"""

import argparse

import lightning
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import hgprompt
from hgprompt.data import render_task


class MixedStart(lightning.Callback):
    """Starts the module's prompt from Σ α_i P_i, and logs how much a mixture would take of it after every epoch.

    Args:
        pool: the prompts to mix. images: labelled images of the new task; the processes share them.
    """

    def __init__(self, pool: hgprompt.PromptPool, images: Dataset) -> None:
        self.pool, self.images = pool, images

    def on_fit_start(self, trainer: lightning.Trainer, module: "Classifier") -> None:
        result = self._mix(trainer, module, self.pool)
        with torch.no_grad():
            module.encoder.prompts.copy_(result.prompt[None])
        if trainer.is_global_zero:
            print(result)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: "Classifier") -> None:
        tuned = {"tuned": module.encoder.prompts[0].detach()}
        result = self._mix(trainer, module, hgprompt.PromptPool(dict(self.pool) | tuned))
        module.log("weight of the tuned prompt", result.weights[-1].float(), rank_zero_only=True)  # all have the same

    def _mix(
        self, trainer: lightning.Trainer, module: "Classifier", prompts: hgprompt.PromptPool
    ) -> hgprompt.EnsembleResult:
        group = dist.group.WORLD if trainer.world_size > 1 else None
        mine = Subset(self.images, range(trainer.global_rank, len(self.images), trainer.world_size))
        return hgprompt.fast_ensemble(
            prompts, DataLoader(mine, batch_size=32), backbone=module.encoder.backbone, process_group=group
        )


class Classifier(lightning.LightningModule):
    """A frozen backbone under one prompt, and a linear head."""

    def __init__(self, vit: hgprompt.FrozenViT, start: torch.Tensor, num_classes: int) -> None:
        super().__init__()
        self.encoder = hgprompt.MultiPromptEncoder(vit, start[None])
        self.head = nn.Linear(vit.width, num_classes)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.encoder(images)[0]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", help="prompts to mix, a .safetensors file")
    parser.add_argument("--task", default="nearest-distance", help="the new task, one of hgprompt's procedural ones")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()

    lightning.seed_everything(42)
    pool = hgprompt.PromptPool.load(arguments.pool)
    vit = hgprompt.load_backbone("mini")
    images = render_task(arguments.task, arguments.images, image_size=vit.image_size[0])
    module = Classifier(vit, pool[pool.names[0]], images.num_classes)
    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu", devices=arguments.devices,
        strategy="ddp" if arguments.devices > 1 else "auto", max_epochs=arguments.epochs,
        callbacks=[MixedStart(pool, images)], logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(images, batch_size=16, shuffle=True))
    if trainer.is_global_zero:
        weight = trainer.callback_metrics["weight of the tuned prompt"]
        print(f"a mixture would take {weight:.3f} of the tuned prompt")


if __name__ == "__main__":
    main()
