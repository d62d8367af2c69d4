"""hgprompt demo"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated

import typer

from hgprompt.cli import options


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="One to four minutes: fewer images and epochs.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Patience: more images, epochs and seeds.")] = False,
    target: Annotated[str | None, typer.Option(help=f"The task that is held out: {options.PROCEDURAL_NAMES}.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """See it work: tune prompts on five tasks, mix them for a sixth, tune from every start, and compare.

    Everything is bundled or rendered on the spot; nothing is downloaded. It prints what came out, whoever wins.
    """
    from hgprompt.cli import show
    from hgprompt.demo import PLANS, check_plan, run_demo
    from hgprompt.errors import OptionError
    from hgprompt.files import output_directory, write_text
    from hgprompt.plots import plot_comparison
    from hgprompt.strict_json import jsonable

    if quick and full:
        raise OptionError("--quick and --full exclude each other")
    plan = PLANS["quick" if quick else "full" if full else "standard"]
    if target is not None:
        plan = dataclasses.replace(plan, target=target)
    check_plan(plan, out)
    began = time.perf_counter()
    with output_directory(out):
        vit = options.load_backbone(None, "mini", device=device, dtype=dtype)
        if not as_json:
            typer.echo(
                f"Five prompts are tuned on five tasks ({plan.source_images} images, {plan.source_epochs} epochs "
                f"each); {plan.target} is held out.\nIts {plan.images} labelled images say how much of each prompt to "
                f"take; then every start is tuned for {plan.epochs} epochs.",
                err=True,
            )
        pool, comparison = run_demo(vit, plan, out, progress=not (quiet or as_json))
        seconds = time.perf_counter() - began
        record = comparison.record()
        record |= {"tuning_seconds": record["seconds"], "seconds": seconds}
        record |= {"plan": dataclasses.asdict(plan), "dtype": str(vit.dtype).removeprefix("torch.")}
        write_text(out / "demo.json", json.dumps(jsonable(record), indent=1, allow_nan=False) + "\n")
        title = f"{plan.target} from prompts for {len(pool)} other tasks"
        plot_comparison(comparison, title, out / "demo.png")
        comparison.ensembles[0].save(out / "ensemble")
    files = [out / name for name in ("demo.png", "demo.json", "pool.safetensors", "ensemble/ensemble.safetensors")]
    if as_json:
        show.print_json(record | {"files": files})
        return
    show.print_comparison(comparison, plan.target)
    typer.echo(f"{seconds:.0f} seconds")
    show.print_files(files)
