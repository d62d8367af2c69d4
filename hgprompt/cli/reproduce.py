"""hgprompt reproduce"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from hgprompt.cli import options

if TYPE_CHECKING:
    from torch import nn

    from hgprompt.paper import Cell, Experiment, Lab, Store

_PROTOCOL, _WORK = "Experiment", "Work"
_USUAL = ("paper", "own")  # targets and sources unless asked otherwise


def reproduce(
    experiment: Annotated[
        str,
        typer.Argument(help="table1, table2, fig3, fig4, fig5 or fig6.", show_default=False, metavar="WHAT"),
    ],
    data_root: Annotated[
        Path, typer.Option("--data-root", help="Holds a folder per task, in VTAB-1k's layout.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for all results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-paper"),
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Target tasks, with commas; 'paper', 'own' and 'all' stand for several. Default: the paper's, and "
            "for table1, fig3 and fig4 your own beside them.",
            show_default=False, rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            help="Tasks to tune source prompts on, with commas. Default: the paper's and your own, all "
            "that are there (fig5: the paper's three).",
            show_default=False, rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="A pool of source prompts, instead of tuning them.", rich_help_panel=_PROTOCOL),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Rows of table1 or panels of fig4, named as there, with commas; also HGPrompt λ=0, or of any other λ, "
            "PARTIAL-2 and MLP-4. Default: all.", show_default=False, rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Of the repetitions, with commas.", rich_help_panel=_PROTOCOL)
    ] = "42,44,82",
    grid: Annotated[
        Literal["full", "rates", "quick", "quick-adamw"],
        typer.Option(
            help="What competes on the validation images: VPT's 10 rates × 4 weight decays; for short budgets those "
            "10, or 4 of them (quick-adamw: 4 for AdamW instead of SGD, for prompts). Methods that train the network "
            "have rates of their own, larger ones for short budgets.",
            rich_help_panel=_PROTOCOL,
        ),
    ] = "full",
    lam: options.Lambda = 1.0,
    test_limit: Annotated[
        int | None,
        typer.Option(
            help="At most this many test images of a task, classes in turn.", min=1, rich_help_panel=_PROTOCOL
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens; default: the pool's, or 50.", min=1, max=10_000, show_default=False,
            rich_help_panel=_PROTOCOL,
        ),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Tokens for every block, as VPT-deep or the pool.", rich_help_panel=_PROTOCOL),
    ] = False,
    epochs: options.Epochs = 100,
    source_epochs: Annotated[
        int, typer.Option(help="Of tuning a source prompt.", min=1, rich_help_panel=options.TRAINING_PANEL)
    ] = 10,
    batch_size: options.BatchSize = 64,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there, done and to do, and stop.", rich_help_panel=_WORK)
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:  # fmt: skip
    """Repeat an experiment of the paper on tasks in VTAB-1k's folder format.

    The work is cut into cells, one file each: interrupted, the same command goes on, and experiments in one folder
    share what they have in common. Under torchrun the processes share the cells; the last one to finish, or the same
    command later, writes the table.
    """
    from hgprompt.bundled import load_model
    from hgprompt.cli import show
    from hgprompt.cli.torchrun import own_gpu
    from hgprompt.errors import OptionError
    from hgprompt.files import output_directory
    from hgprompt.paper import EXPERIMENTS, Lab, Plan, Share, Store, find_suite, make_request, method_names, run_cells
    from hgprompt.paper.experiments import uses_pool
    from hgprompt.pool import PromptPool

    if experiment not in EXPERIMENTS:
        raise OptionError(f"nothing of the paper is called {experiment!r}: there are {', '.join(EXPERIMENTS)}")
    wanted = EXPERIMENTS[experiment]
    if pool is not None and sources is not None:
        raise OptionError("--pool brings its source prompts: leave --sources out")
    known = None if pool is None else PromptPool.load(pool)
    if known is not None:
        tokens, deep = tokens or known.num_tokens, deep or known.is_deep
    plan = Plan(
        tokens=tokens or 50, deep=deep, epochs=epochs, source_epochs=source_epochs, seeds=_numbers(seeds),
        batch_size=batch_size, grid=grid, lam=lam, test_limit=test_limit,
    )  # fmt: skip
    wanted.check()
    share = Share.of_environment()
    of_targets = _names(tasks) or wanted.targets or _USUAL
    of_sources = () if pool is not None else _names(sources) or wanted.sources or _USUAL
    suite = find_suite(data_root, [*of_targets, *of_sources])
    targets, tuned = suite.named(of_targets), suite.named(of_sources) if of_sources else None
    say: Callable[[str], None] = lambda line: None if as_json or share.rank else typer.echo(line, err=True)  # noqa: E731
    for line in suite.lines():
        say(line)
    vit = options.load_backbone(
        None if known is None else known.backbone, backbone, weights=weights, device=device or own_gpu(), dtype=dtype,
        image_size=image_size, default="mini", mean=mean, std=std, interpolation=interpolation,
    )  # fmt: skip

    def model() -> nn.Module:
        return load_model(vit.name, checkpoint=None if weights is None else str(weights), img_size=vit.image_size)

    lab = Lab(vit, model, suite, plan, out, pool=known, sources=tuned)
    request = make_request(wanted, lab, targets, method_names(methods or ""))
    cells, store = wanted.cells(lab, request), Store(out)
    prepare = lab.source_cells() if uses_pool(request.methods) else []
    if dry_run:
        _print_plan(wanted, lab, store, prepare, cells, as_json)
        return
    with output_directory(out):
        progress = not (quiet or as_json) and share.rank == 0
        run_cells(store, prepare, share=share, progress=progress, stage="source prompts", wait=True)
        if prepare:
            lab.whole_pool()
        records = run_cells(store, cells, share=share, progress=progress)
        if len(records) < len(cells):
            if as_json:
                ahead = [cell.key for cell in cells if cell.key not in records]
                show.print_json({"experiment": experiment, "done": list(records), "to_do": ahead})
            typer.echo(
                f"{len(cells) - len(records)} of {len(cells)} cells are other processes', which are at them: the last "
                "one writes the result. Should they have been stopped, this command goes on with their work",
                err=True,
            )
            return
        files = wanted.write(lab, request, records)
        if prepare:
            files.append(lab.pool_file)
    if as_json:
        show.print_json({"experiment": experiment, "missing": suite.missing, "cells": records, "files": files})
        return
    typer.echo(files[0].read_text(encoding="utf-8"))
    show.print_files(files)


def _print_plan(
    wanted: Experiment, lab: Lab, store: Store, prepare: list[Cell], cells: list[Cell], as_json: bool
) -> None:
    from hgprompt.cli import show

    done = store.finished([*prepare, *cells])
    ahead = [cell.key for cell in (*prepare, *cells) if cell.key not in done]
    if as_json:
        missing = list(lab.suite.missing)
        show.print_json({"experiment": wanted.name, "missing": missing, "done": list(done), "to_do": ahead})
        return
    typer.echo(f"{wanted.title}: {len(done)} cells done, {len(ahead)} to do")
    for name, task in lab.suite.tasks.items():
        counts = " / ".join(f"{len(task.splits[s].samples)}" for s in ("train800", "val200", "test"))
        typer.echo(f"  task {name}: {task.num_classes} classes, {counts} training, validation and test images")
    for key in ahead:
        typer.echo(f"  to do {key}")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    from hgprompt.errors import OptionError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"--seeds must be whole numbers with commas between them, got {text!r}") from error
