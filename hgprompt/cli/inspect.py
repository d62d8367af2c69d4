"""hgprompt inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hgprompt.cli import options


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A prompt pool (.safetensors), or a folder that 'ensemble' or 'tune' wrote."),
    ],
    as_json: options.AsJson = False,
) -> None:
    """Show what a prompt pool, an ensemble or a tuned prompt holds."""
    from hgprompt.cli import show
    from hgprompt.pool import PromptPool
    from hgprompt.tuning import TuneResult

    found = options.opened(path)
    if isinstance(found, TuneResult):
        if as_json:
            show.print_json({"task": found.task, "class_names": found.class_names, "history": list(found.history)})
        else:
            show.print_tuned(found)
        return
    if found is not None:
        if as_json:
            show.print_json(show.ensemble_numbers(found))
        else:
            show.print_ensemble(found, (path.parent if path.is_file() else path).name)
        return
    pool = PromptPool.load(path)
    if as_json:
        backbone = None if pool.backbone is None else pool.backbone.to_dict()
        shapes = {name: list(prompt.shape) for name, prompt in pool.items()}
        show.print_json({"prompts": shapes, "backbone": backbone, "metadata": pool.metadata})
    else:
        show.print_pool(pool)
