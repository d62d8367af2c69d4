"""hgprompt ensemble"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hgprompt.cli import options


def ensemble(
    pool: Annotated[Path, typer.Argument(help="Prompt pool, a .safetensors file (train-source makes one).")],
    data: options.Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-ensemble"),
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    split: options.Split = "train800val200",
    limit: options.Limit = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave this prompt of the pool out; may be given several times.")
    ] = None,
    lam: Annotated[float, typer.Option("--lambda", help="Pull of gradient alignment (λ of Eq. 12).", min=0.0)] = 1.0,
    shrinkage: Annotated[
        str, typer.Option(help="auto, ledoit-wolf, oas, or a number in [0, 1); 0 is Eq. 5 to the letter.")
    ] = "auto",
    paper: Annotated[
        bool, typer.Option("--paper", help="Algorithm 1 to the letter (slower, and often saturated).")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Images per batch.", min=1)] = 32,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the gradient sample and the solver's starts.")] = 0,
    plot: Annotated[bool, typer.Option(help="Draw the figure.", rich_help_panel=options.OUTPUT_PANEL)] = True,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Say how much of each prompt to take for a new labelled task, and mix them.

    Reads the images once. Writes the mixed prompt, the weights and their reasons into the output folder; 'tune' starts
    from it.
    """
    from hgprompt.cli import show
    from hgprompt.data import load_task, make_loader
    from hgprompt.ensemble import fast_ensemble
    from hgprompt.files import make_directory
    from hgprompt.pool import PromptPool

    prompts = PromptPool.load(pool)
    if exclude:
        prompts = prompts.without(*exclude)
    procedural = data.startswith(options.PROCEDURAL)
    task = None if procedural else load_task(data, split)
    make_directory(out)  # an unwritable place is an error before the work, not after it
    vit = options.load_backbone(prompts.backbone, backbone, weights, device, dtype)
    loader: Any
    if task is None:
        loader = options.render(data, split, vit, limit, seed).batches(batch_size)
    else:
        loader = make_loader(
            task, vit.image_size, batch_size=batch_size, interpolation=vit.interpolation, workers=workers, limit=limit
        )
    result = fast_ensemble(
        prompts,
        loader,
        backbone=vit,
        lam=lam,
        shrinkage=_shrinkage(shrinkage),
        preset="paper" if paper else None,
        seed=seed,
        progress=not (quiet or as_json),
    )
    result.save(out)
    files = [out / "ensemble.safetensors", out / "report.json"]
    if plot:
        result.plot(out / "ensemble.png")
        files.append(out / "ensemble.png")
    if as_json:
        show.print_json(show.ensemble_numbers(result) | {"files": files})
        return
    show.print_ensemble(result, options.task_name(data))
    show.print_files(files)


def _shrinkage(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
