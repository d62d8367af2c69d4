"""Options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from hgprompt.backbone import FrozenViT
    from hgprompt.data import ImageDataset, ImageTask, LabelledImages
    from hgprompt.pool import BackboneInfo

PROCEDURAL = "procedural:"
BACKBONE_PANEL, TRAINING_PANEL, OUTPUT_PANEL = "Backbone", "Training", "Output"
_DATA_HELP = (
    "a VTAB-1k folder, a folder with one sub-folder of images per class, or procedural:NAME "
    "(sprite-x-location, sprite-orientation, object-count, nearest-distance, azimuth, elevation)."
)

Data = Annotated[str, typer.Argument(help="The new task: " + _DATA_HELP, show_default=False, metavar="DATA")]
DataList = Annotated[
    list[str], typer.Argument(help="Source tasks, each " + _DATA_HELP, show_default=False, metavar="DATA")
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="'mini' or a timm model name; default: the pool's, or mini.",
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
        show_default=False,
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Split = Annotated[str, typer.Option(help="Which split file of a VTAB-1k folder.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Use at most this many images, classes in turn; of a procedural task, 1000.", min=1),
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
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, float64, or auto: bfloat16 where the hardware multiplies it.",
        rich_help_panel=BACKBONE_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Of the random start, the head and the order of images.", min=0, rich_help_panel=TRAINING_PANEL),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.", min=1, rich_help_panel=TRAINING_PANEL)]
BatchSize = Annotated[int, typer.Option(help="Images per step.", min=1, rich_help_panel=TRAINING_PANEL)]
Optimizer = Annotated[str, typer.Option(help="sgd (momentum 0.9) or adamw.", rich_help_panel=TRAINING_PANEL)]
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
WeightDecay = Annotated[float, typer.Option(help="Of prompt and head.", min=0.0, rich_help_panel=TRAINING_PANEL)]
Warmup = Annotated[
    float,
    typer.Option(help="Share of the steps in which the rate rises.", min=0.0, max=0.9, rich_help_panel=TRAINING_PANEL),
]
PromptDropout = Annotated[
    float,
    typer.Option(help="Share of prompt elements zeroed in a step.", min=0.0, max=0.9, rich_help_panel=TRAINING_PANEL),
]


def load_backbone(
    info: BackboneInfo | None,
    name: str | None,
    weights: Path | None,
    device: str | None,
    dtype: str,
    image_size: int | None = None,
    default: str | None = None,
) -> FrozenViT:
    """The backbone that the options name, or a pool's."""
    import torch

    from hgprompt.bundled import load_backbone
    from hgprompt.errors import BackboneError, OptionError

    chosen = name or (info.name if info is not None else default)
    if chosen is None:
        raise BackboneError("this pool names no backbone: give --backbone")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"--device {device!r} is not known: {str(error).splitlines()[0]}") from error
    options: dict[str, Any] = {}
    if image_size is not None:
        options["img_size"] = image_size
    elif info is not None:
        options["img_size"] = info.image_size
    return load_backbone(
        chosen,
        checkpoint=None if weights is None else str(weights),
        device=device,
        dtype=_dtype(dtype, device),
        **options,
    )


def _dtype(name: str, device: str) -> torch.dtype:
    import torch

    from hgprompt.bundled import fast_dtype
    from hgprompt.errors import OptionError

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        return fast_dtype(device)
    if name not in kinds:
        raise OptionError(f"--dtype must be auto, {', '.join(kinds)}; got {name!r}")
    return kinds[name]


def load_images(
    data: str, split: str, vit: FrozenViT, *, limit: int | None, seed: int = 0, quiet: bool = True
) -> LabelledImages | ImageDataset:
    """The images of a folder, or rendered ones."""
    from hgprompt.data import load_task, open_images
    from hgprompt.progress import Progress

    if data.startswith(PROCEDURAL):
        return render(data, split, vit, limit, seed)
    task: ImageTask = load_task(data, split)
    with Progress.of(not quiet) as report:
        return open_images(
            task,
            vit.image_size,
            interpolation=vit.interpolation,
            limit=limit,
            seed=seed,
            report=lambda done, total: report("decoding", done, total),
        )


def render(data: str, split: str, vit: FrozenViT, limit: int | None, seed: int) -> LabelledImages:
    """The images of procedural:NAME; any split but a test split is of one kind."""
    from hgprompt.data import render_task

    kind = "test" if split.startswith("test") else "train"
    return render_task(
        data.removeprefix(PROCEDURAL), limit or 1000, image_size=vit.image_size[0], seed=seed, split=kind
    )


def task_name(data: str) -> str:
    """What a task is called: its folder's name, or a procedural task's."""
    return data.removeprefix(PROCEDURAL) if data.startswith(PROCEDURAL) else Path(data).resolve().name
