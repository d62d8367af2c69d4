"""hgprompt select"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from hgprompt.cli import options


def select(
    pool: Annotated[Path, typer.Argument(help="A large prompt pool, a .safetensors file.")],
    data: options.Data,
    size: Annotated[int, typer.Option("--size", "-m", help="Prompts to select.", min=1)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write their pool.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("selected.safetensors"),
    method: Annotated[
        Literal["halving", "greedy", "ranking"],
        typer.Option(
            help="halving: poor prompts see few images; greedy: every prompt sees all; ranking: each by its H alone."
        ),
    ] = "halving",
    full_evaluation: Annotated[
        bool, typer.Option("--full-evaluation", help="Show every prompt every image all the same, and say the regret.")
    ] = False,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    split: options.Split = "train800val200",
    limit: options.Limit = None,
    bad_images: options.BadImages = "stop",
    follow_links: options.FollowLinks = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 16,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    seed: Annotated[int, typer.Option(help="Of the order of the images.", min=0, max=2**63 - 1)] = 0,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the prompts of a large pool that are worth mixing for a new labelled task.

    Reads the images once, shuffled. Writes a pool of the prompts selected, most wanted first, for 'ensemble'.
    """
    from hgprompt.cli import show
    from hgprompt.errors import OptionError
    from hgprompt.files import make_directory
    from hgprompt.pool import PromptPool
    from hgprompt.selection import select_prompts

    prompts = PromptPool.load(pool)
    if out.is_dir():
        raise OptionError(f"--out {out} is a folder: give the file of the new pool, such as {out / 'pool.safetensors'}")
    if out.exists() and out.samefile(pool):
        raise OptionError(f"--out {out} is the pool itself, whose other prompts would be lost: give another file")
    make_directory(out.parent)
    vit = options.load_backbone(
        prompts.backbone, backbone, weights=weights, device=device, dtype=dtype, image_size=image_size, mean=mean,
        std=std, interpolation=interpolation,
    )  # fmt: skip
    images = options.load_images(
        data, split, vit, limit=limit, quiet=quiet or as_json, bad_images=bad_images, follow_links=follow_links
    )
    found = select_prompts(
        prompts,
        options.batches(images, batch_size, seed=seed),
        size=size,
        backbone=vit,
        method=method,
        num_images=len(images),
        full_evaluation=full_evaluation,
        progress=not (quiet or as_json),
    )
    found.pool.save(out)
    if as_json:
        show.print_json(show.selection_numbers(found) | {"files": [out]} | show.skipped_images(images))
        return
    show.print_selection(found, options.task_name(data), len(prompts))
    show.print_files([out])
