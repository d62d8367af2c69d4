"""hgprompt ensemble"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from hgprompt.cli import options

SPLIT = "train800val200"


def ensemble(
    pool: Annotated[Path, typer.Argument(help="Prompt pool, a .safetensors file (train-source makes one).")],
    data: options.Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-ensemble"),
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    split: options.Split = SPLIT,
    limit: options.Limit = None,
    bad_images: options.BadImages = "stop",
    follow_links: options.FollowLinks = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave this prompt of the pool out; may be given several times.")
    ] = None,
    lam: options.Lambda = 1.0,
    shrinkage: Annotated[
        str, typer.Option(help="auto, ledoit-wolf, oas, or a number in [0, 1); 0 is Eq. 5 to the letter.")
    ] = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Stop reading images when the weights are known to this L1 distance (0.1, say); "
            "the images are shuffled then. Default: read all."
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Algorithm 1 to the letter (slower, often saturated), without shrinkage whatever --shrinkage says.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 32,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: Annotated[
        int, typer.Option(help="Of the gradient sample and the solver's starts.", min=0, max=2**63 - 1)
    ] = 0,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is done in this folder: the same command goes on from there after an interruption.",
            show_default=False,
            rich_help_panel=options.OUTPUT_PANEL,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw the figure.", rich_help_panel=options.OUTPUT_PANEL)] = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Say how much of each prompt to take for a new labelled task, and mix them.

    Reads the images once. Writes the mixed prompt, the weights and their reasons into the output folder; 'tune' starts
    from it. Under torchrun (torchrun --nproc-per-node 8 -m hgprompt.cli ensemble …) the processes share the images.
    """
    import contextlib

    from hgprompt.cli import show
    from hgprompt.cli.torchrun import job
    from hgprompt.ensemble import fast_ensemble
    from hgprompt.files import output_directory
    from hgprompt.pool import PromptPool

    prompts = PromptPool.load(pool)
    if exclude:
        prompts = prompts.without(*exclude)
    with job(device) as mine, output_directory(out) if mine.first else contextlib.nullcontext():
        quiet = quiet or as_json or not mine.first
        vit = options.load_backbone(
            prompts.backbone, backbone, weights=weights, device=device, dtype=dtype, image_size=image_size, mean=mean,
            std=std, interpolation=interpolation,
        )  # fmt: skip
        images = options.load_images(
            data, split, vit, limit=limit, quiet=quiet, bad_images=bad_images, follow_links=follow_links
        )
        if not quiet:
            show.print_memory(len(prompts), vit.width, len(images), images.num_classes, vit.dtype.itemsize)
        order = None if tolerance is None else seed
        result = fast_ensemble(
            prompts,
            options.batches(images, batch_size, seed=order, share=(mine.rank, mine.world)),
            backbone=vit,
            lam=lam,
            shrinkage=_shrinkage(shrinkage),
            tolerance=tolerance,
            preset="paper" if paper else None,
            seed=seed,
            checkpoint_dir=checkpoint_dir,
            progress=not quiet,
            process_group=mine.group,
        )
        if not mine.first:
            return
        skipped = show.skipped_images(images)
        result = dataclasses.replace(result, settings=result.settings | skipped)
        result.save(out)
        files = [out / "ensemble.safetensors", out / "report.json"]
        if plot:
            result.plot(out / "ensemble.png")
            files.append(out / "ensemble.png")
    if as_json:
        show.print_json(show.ensemble_numbers(result) | {"files": files} | skipped)
        return
    show.print_ensemble(result, options.task_name(data))
    show.print_files(files)
    # The same network and the same images, whatever they were.
    shared = {
        "--backbone": backbone, "--weights": weights, "--image-size": image_size, "--mean": mean, "--std": std,
        "--interpolation": interpolation, "--split": split if split != SPLIT else None, "--limit": limit,
        "--bad-images": bad_images if bad_images != "stop" else None, "--device": device,
    }  # fmt: skip
    given = [part for name, value in shared.items() if value is not None for part in (name, str(value))]
    given += ["--follow-links"] if follow_links else []
    show.print_starts(["hgprompt", "tune", data, *given], out, f"{pool}:{result.best_single}")


def _shrinkage(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
