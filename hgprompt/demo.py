"""The demo: a pool of prompts tuned on some tasks meets a task that none of them was tuned for.

Everything is rendered or bundled: procedural tasks and the mini backbone. What comes out is what was measured on the
spot; nothing here knows who should win.
"""

from __future__ import annotations

import dataclasses
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from hgprompt.backbone import FrozenViT
from hgprompt.data import PROCEDURAL_TASKS, LabelledImages, render_task
from hgprompt.errors import OptionError, OutputError
from hgprompt.files import make_directory
from hgprompt.pool import PromptPool
from hgprompt.progress import Reporter
from hgprompt.tuning import Comparison, TuneConfig, compare_starts, random_prompt, tune

INIT_SEED = 0  # none of the seeds of runs: their random start would be that of the sources
_CHECKPOINTS = ".hgprompt-demo-"


@dataclass(frozen=True)
class DemoPlan:
    """How much of everything.

    Attributes:
        target: the task that is held out; all other procedural tasks are sources.
        source_images, source_epochs: of each source prompt's training.
        images, test_images, epochs: of the target; each seed draws its own training images.
        seeds: one run of every start each. num_tokens: p.
    """

    target: str = "nearest-distance"
    source_images: int = 256
    source_epochs: int = 6
    images: int = 160
    test_images: int = 200
    epochs: int = 6
    seeds: tuple[int, ...] = (42, 44, 82)
    num_tokens: int = 10


PLANS = {
    "quick": DemoPlan(source_images=160, source_epochs=4, images=96, test_images=120, epochs=4),
    "standard": DemoPlan(),
    "full": DemoPlan(
        source_images=800, source_epochs=20, images=400, test_images=600, epochs=20, seeds=(42, 44, 82, 7, 19)
    ),
}
SOURCE_CONFIG = TuneConfig(batch_size=32, optimizer="adamw", lr=0.16, head_lr=0.04, seed=INIT_SEED)
TARGET_CONFIG = TuneConfig(batch_size=32, optimizer="adamw", lr=0.16, head_lr=0.04)


def run_demo(
    backbone: FrozenViT, plan: DemoPlan, folder: Path, progress: bool | Reporter = False
) -> tuple[PromptPool, Comparison]:
    """Tune the sources, mix them for the target, tune from all starts. Writes pool.safetensors into the folder.

    An interrupted demo goes on from its checkpoints when it is run again with the same plan.

    Raises:
        OptionError: the target is none of the procedural tasks. OutputError: the folder holds a pool of another origin.
    """
    check_plan(plan, folder)
    # A place of its own for every plan: what another one left behind is neither used nor in the way.
    what = f"{plan}{backbone.fingerprint}{backbone.dtype}{SOURCE_CONFIG}{TARGET_CONFIG}"
    checkpoints = make_directory(folder / f"{_CHECKPOINTS}{zlib.crc32(what.encode()):08x}")
    size = backbone.image_size[0]
    pool = tune_sources(backbone, plan, checkpoints, progress)
    pool.save(folder / "pool.safetensors")

    def draw(seed: int) -> LabelledImages:
        return render_task(plan.target, plan.images, image_size=size, seed=seed)

    test = render_task(plan.target, plan.test_images, image_size=size, split="test")
    comparison = compare_starts(
        backbone, pool, draw, test, seeds=plan.seeds, epochs=(plan.epochs,), config=TARGET_CONFIG, variants=(0.0,),
        folder=checkpoints, progress=progress,
    )  # fmt: skip
    shutil.rmtree(checkpoints, ignore_errors=True)
    return pool, comparison


def check_plan(plan: DemoPlan, folder: Path) -> None:
    """Raise OptionError or OutputError for what would go wrong, or destroy something, later."""
    if plan.target not in PROCEDURAL_TASKS:
        raise OptionError(f"no procedural task is named {plan.target!r}; there are {', '.join(PROCEDURAL_TASKS)}")
    path = folder / "pool.safetensors"
    if path.exists():
        known = PromptPool.load(path)
        if not all(known.metadata[name].get("source") == "procedural" for name in known):
            raise OutputError(f"{path} is a pool that no demo has made, and would be lost: choose another folder")


def tune_sources(backbone: FrozenViT, plan: DemoPlan, checkpoints: Path, progress: bool | Reporter) -> PromptPool:
    """One prompt for each procedural task but the target, all from the same random start."""
    config = dataclasses.replace(SOURCE_CONFIG, epochs=plan.source_epochs)
    start = random_prompt(backbone, plan.num_tokens, seed=INIT_SEED)
    prompts: dict[str, torch.Tensor] = {}
    metadata = {}
    for name in PROCEDURAL_TASKS:
        if name == plan.target:
            continue
        images = render_task(name, plan.source_images, image_size=backbone.image_size[0], seed=INIT_SEED)
        tuned = tune(
            backbone, {name: start}, images, config=config, progress=progress, stage=name,
            checkpoint=checkpoints / f"source-{name}.checkpoint.safetensors",
        )  # fmt: skip
        prompts[name] = tuned.prompt(name)
        metadata[name] = {
            "task": name,
            "source": "procedural",
            "init_seed": INIT_SEED,
            "training": dataclasses.asdict(config) | {"images": len(images)},
            "train_accuracy": tuned.history[-1]["train_accuracy"][0],
        }
    return PromptPool(prompts, backbone=backbone.info, metadata=metadata)
