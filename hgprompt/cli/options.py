"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

    from hgprompt.backbone import FrozenViT
    from hgprompt.data import ImageDataset, ImageTask, LabelledImages
    from hgprompt.pool import BackboneInfo
    from hgprompt.result import EnsembleResult
    from hgprompt.tuning import TuneResult

PROCEDURAL = "procedural:"
BACKBONE_PANEL, TRAINING_PANEL, OUTPUT_PANEL = "Backbone", "Training", "Output"
PROCEDURAL_NAMES = "sprite-x-location, sprite-orientation, object-count, nearest-distance, azimuth, elevation"
_DATA_HELP = (
    f"a VTAB-1k folder, a folder with one sub-folder of images per class, or procedural:NAME ({PROCEDURAL_NAMES})."
)

Data = Annotated[str, typer.Argument(help="The new task: " + _DATA_HELP, show_default=False, metavar="DATA")]
DataList = Annotated[
    list[str], typer.Argument(help="Source tasks, each " + _DATA_HELP, show_default=False, metavar="DATA")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="'mini' or a timm model name; default: the pool's (without a pool: mini).",
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The backbone's weights as safetensors, instead of timm's download.",
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Pixels; default: the pool's, or the model's own.",
        min=16,
        max=2048,
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Lambda = Annotated[
    float,
    typer.Option(
        "--lambda", "--lam", min=0.0,
        help="Pull of gradient alignment, beside H / (C - 1). Eq. 12 has H itself: its λ is C - 1 times this one.",
    ),
]  # fmt: skip
Split = Annotated[str, typer.Option(help="Which split file of a VTAB-1k folder.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Use at most this many images, classes in turn; default: all, of a procedural task 1000.", min=1),
]
BadImages = Annotated[
    Literal["stop", "skip"],
    typer.Option(
        "--bad-images",
        help="What becomes of an image that cannot be read: stop, or skip (left out, counted and named; an error where "
        "it is more than half of them, or all of a class).",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Take images that links lead to outside the folder: for a folder of your own."),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, …; default: a GPU if there is one.", show_default=False, rich_help_panel=BACKBONE_PANEL
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout and nothing else.", rich_help_panel=OUTPUT_PANEL)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.", rich_help_panel=OUTPUT_PANEL)]
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Dtype = Annotated[
    Precision,
    typer.Option(
        help="Of the network's numbers; auto: bfloat16 where the hardware multiplies it.",
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Of the random start, the head and the order of images.", min=0, max=2**63 - 1,
        rich_help_panel=TRAINING_PANEL,
    ),
]  # fmt: skip
Epochs = Annotated[int, typer.Option(help="Passes over the training images.", min=1, rich_help_panel=TRAINING_PANEL)]
BatchSize = Annotated[int, typer.Option(help="Images per step.", min=1, rich_help_panel=TRAINING_PANEL)]
Optimizer = Annotated[
    Literal["sgd", "adamw"],
    typer.Option(
        help="sgd: with momentum 0.9; VPT's grid for it goes from 0.05 to 50.", rich_help_panel=TRAINING_PANEL
    ),
]
LearningRate = Annotated[
    float,
    typer.Option(
        "--lr",
        help="Base learning rate of the prompt; the rate is this × batch size / 256.",
        min=0.0,
        rich_help_panel=TRAINING_PANEL,
    ),
]
HeadLearningRate = Annotated[
    float | None,
    typer.Option(
        "--head-lr",
        help="Base learning rate of the head; default: a quarter of --lr.",
        min=0.0,
        rich_help_panel=TRAINING_PANEL,
    ),
]
HeadStart = Annotated[
    Literal["random", "fitted"],
    typer.Option(
        "--head",
        help="What the linear head starts as: random, or fitted to the training images in closed form (one more pass).",
        rich_help_panel=TRAINING_PANEL,
    ),
]
WeightDecay = Annotated[float, typer.Option(help="Of prompt and head.", min=0.0, rich_help_panel=TRAINING_PANEL)]
Warmup = Annotated[
    float,
    typer.Option(help="Share of the steps in which the rate rises.", min=0.0, max=0.9, rich_help_panel=TRAINING_PANEL),
]
PromptDropout = Annotated[
    float,
    typer.Option(help="Share of prompt elements zeroed in a step.", min=0.0, max=0.9, rich_help_panel=TRAINING_PANEL),
]


Mean = Annotated[
    str | None,
    typer.Option(
        help="Mean of the channels that images are normalised with, as 0.5,0.5,0.5; default: the pool's, or timm's.",
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Std = Annotated[
    str | None,
    typer.Option(help="Their standard deviation, likewise.", show_default=False, rich_help_panel=BACKBONE_PANEL),
]
Interpolation = Annotated[
    Literal["bicubic", "bilinear", "nearest", "lanczos"] | None,
    typer.Option(
        help="Resize filter; default: the pool's, or timm's.",
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]


def load_backbone(
    info: BackboneInfo | None,
    name: str | None,
    *,
    device: str | None,
    dtype: Precision,
    weights: Path | None = None,
    image_size: int | None = None,
    default: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    interpolation: str | None = None,
) -> FrozenViT:
    """The backbone that the options name, or a pool's."""
    import torch

    from hgprompt.arguments import check_place
    from hgprompt.bundled import load_backbone
    from hgprompt.errors import BackboneError, OptionError

    chosen = name or (info.name if info is not None else default)
    if chosen is None:
        raise BackboneError("this pool names no backbone: give --backbone")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_place(device, None)
    options: dict[str, Any] = {}
    if image_size is not None:
        options["img_size"] = image_size
    elif info is not None:
        options["img_size"] = info.image_size
    vit = load_backbone(
        chosen,
        checkpoint=None if weights is None else str(weights),
        device=device,
        dtype=_dtype(dtype, device),
        **options,
    )
    if info is not None:
        vit.set_preprocessing(mean=info.mean, std=info.std, interpolation=info.interpolation)
    vit.set_preprocessing(mean=_numbers("mean", mean), std=_numbers("std", std), interpolation=interpolation)
    if any(size % patch for size, patch in zip(vit.image_size, vit.patch_size, strict=True)):
        patch = vit.patch_size[0]
        raise OptionError(
            f"{vit.image_size[0]} pixels are no multiple of {vit.name}'s patches of {patch}: they would be cut"
        )
    return vit


def opened(path: Path) -> TuneResult | EnsembleResult | None:
    """What 'ensemble' or 'tune' wrote: a folder with one of their files, or such a file; None for another file."""
    from hgprompt.errors import FileFormatError
    from hgprompt.result import EnsembleResult
    from hgprompt.tuning import TuneResult

    kinds: dict[str, Callable[[Path], TuneResult | EnsembleResult]]
    kinds = {"ensemble.safetensors": EnsembleResult.load, "tuned.safetensors": TuneResult.load}
    if path.is_file() or not path.exists():
        return kinds[path.name](path) if path.name in kinds else None
    there = [name for name in kinds if (path / name).is_file()]
    if not there:
        raise FileFormatError(f"{path} holds neither an ensemble nor a tuned prompt")
    if len(there) > 1:
        raise FileFormatError(f"{path} holds an ensemble and a tuned prompt: name {' or '.join(there)} in it")
    return kinds[there[0]](path)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from hgprompt.errors import OptionError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--{option} must be numbers with commas between them, got {text!r}") from error


def _dtype(name: Precision, device: str) -> torch.dtype:
    import torch

    from hgprompt.bundled import fast_dtype

    found: torch.dtype = fast_dtype(device) if name == "auto" else getattr(torch, name)
    return found


def load_images(
    data: str,
    split: str,
    vit: FrozenViT,
    *,
    limit: int | None,
    quiet: bool = True,
    bad_images: Literal["stop", "skip"] = "stop",
    follow_links: bool = False,
) -> LabelledImages | ImageDataset:
    """The images of a folder, or rendered ones. The same limit means the same images in every command."""
    from hgprompt.data import load_task, open_images
    from hgprompt.progress import Progress

    with Progress.of(not quiet) as report:
        if data.startswith(PROCEDURAL):
            return _render(data, split, vit, limit, lambda done, total: report("rendering", done, total))
        task: ImageTask = load_task(data, split, follow_links=follow_links)
        if limit is not None and limit < task.num_classes:
            typer.secho(
                f"warning: {limit} images of {task.num_classes} classes leave some without any", fg="yellow", err=True
            )
        return open_images(
            task,
            vit.image_size,
            interpolation=vit.interpolation,
            limit=limit,
            report=lambda done, total: report("decoding", done, total),
            bad_images=bad_images,
        )


def batches(
    images: LabelledImages | ImageDataset, batch_size: int, *, seed: int | None, share: tuple[int, int] = (0, 1)
) -> Iterable[Any]:
    """A loader of the images, with a seed in an order drawn by it. share: (r, W): every W-th image, from image r on."""
    import torch

    from hgprompt.data import LabelledImages
    from hgprompt.data.folders import WORKER_TIMEOUT, available_cores

    rank, world = share
    if isinstance(images, LabelledImages):
        if seed is not None:
            images = images.subset(torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)))
        return (images if world == 1 else images.subset(torch.arange(rank, len(images), world))).batches(batch_size)
    workers: dict[str, Any] = {"num_workers": max(1, available_cores() // world), "timeout": WORKER_TIMEOUT}
    order = torch.Generator().manual_seed(seed or 0)
    if world > 1:
        every = torch.arange(len(images)) if seed is None else torch.randperm(len(images), generator=order)
        return torch.utils.data.DataLoader(
            torch.utils.data.Subset(images, every[rank::world].tolist()), batch_size, **workers
        )
    return torch.utils.data.DataLoader(images, batch_size, shuffle=seed is not None, generator=order, **workers)


def _render(
    data: str, split: str, vit: FrozenViT, limit: int | None, report: Callable[[int, int], None]
) -> LabelledImages:
    """The images of procedural:NAME, which has a training and a test split."""
    from hgprompt.data import render_task
    from hgprompt.errors import DataError

    if not split.startswith("train") and split != "test":
        raise DataError(f"{data} has the splits train and test, not {split!r}")
    name, kind = data.removeprefix(PROCEDURAL), "test" if split == "test" else "train"
    return render_task(name, limit or 1000, image_size=vit.image_size[0], split=kind, report=report)


def task_name(data: str) -> str:
    """What a task is called: its folder's name, or a procedural task's."""
    return data.removeprefix(PROCEDURAL) if data.startswith(PROCEDURAL) else Path(os.path.abspath(data)).name
