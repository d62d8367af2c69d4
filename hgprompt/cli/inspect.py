"""hgprompt inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hgprompt.cli.options import AsJson


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A prompt pool (.safetensors), or a folder that 'ensemble' or 'tune' wrote."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a prompt pool, an ensemble or a tuned prompt holds."""
    from hgprompt.cli import show
    from hgprompt.errors import FileFormatError
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult
    from hgprompt.tuning import TuneResult

    if path.name in ("tuned.safetensors", "ensemble.safetensors") and path.is_file():
        path = path.parent
    if path.is_dir() and (path / "tuned.safetensors").is_file():
        tuned = TuneResult.load(path)
        if as_json:
            show.print_json({"task": tuned.task, "class_names": tuned.class_names, "history": list(tuned.history)})
        else:
            show.print_tuned(tuned)
        return
    if path.is_dir():
        if not (path / "ensemble.safetensors").is_file():
            raise FileFormatError(f"{path} holds neither an ensemble nor a tuned prompt")
        result = EnsembleResult.load(path)
        if as_json:
            show.print_json(show.ensemble_numbers(result))
        else:
            show.print_ensemble(result, path.name)
        return
    pool = PromptPool.load(path)
    if as_json:
        backbone = None if pool.backbone is None else pool.backbone.to_dict()
        shapes = {name: list(prompt.shape) for name, prompt in pool.items()}
        show.print_json({"prompts": shapes, "backbone": backbone, "metadata": pool.metadata})
    else:
        show.print_pool(pool)
