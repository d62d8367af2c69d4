"""The command line: hgprompt ensemble, hgprompt inspect."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hgprompt.backbone import FrozenViT
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult

app = typer.Typer(
    help="Reuse a pool of visual prompts on a new task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _common() -> None:
    """Reuse a pool of visual prompts on a new task."""


@app.command()
def ensemble(
    pool: Annotated[Path, typer.Argument(help="Prompt pool, a .safetensors file of PromptPool.save.")],
    data: Annotated[
        Path, typer.Argument(help="The new task: a VTAB-1k folder, or a folder with one sub-folder per class.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("hgprompt-ensemble"),
    backbone: Annotated[str | None, typer.Option(help="timm model name; default: the one that the pool names.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The backbone's weights as safetensors, instead of timm's download.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split file of a VTAB-1k folder.")] = "train800val200",
    limit: Annotated[int | None, typer.Option(help="Read at most this many images, classes in turn.", min=1)] = None,
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
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: a GPU if there is one.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that decode images.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the gradient sample and the solver's starts.")] = 0,
    plot: Annotated[bool, typer.Option(help="Draw the figure (needs the extra 'plots').")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Say how much of each prompt to take for a new labelled task, and mix them.

    Reads the images once. Writes the mixed prompt, the weights and their reasons into the output folder.
    """
    from hgprompt.data import load_task, make_loader
    from hgprompt.ensemble import fast_ensemble
    from hgprompt.files import make_directory
    from hgprompt.pool import PromptPool

    prompts = PromptPool.load(pool)
    if exclude:
        prompts = prompts.without(*exclude)
    task = load_task(data, split)
    make_directory(out)  # an unwritable place is an error before the work, not after it
    vit = _backbone(prompts, backbone, weights, device, dtype)
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
    if plot and _has_matplotlib():
        result.plot(out / "ensemble.png")
        files.append(out / "ensemble.png")
    if as_json:
        _print_json(
            {"weights": dict(zip(result.names, result.weights.tolist(), strict=True)), "files": files}
            | _numbers(result)
        )
        return
    _print_result(result, task.name)
    if plot and not _has_matplotlib():
        typer.echo("no figure: python -m pip install 'hgprompt[plots]' draws one", err=True)
    typer.echo("wrote " + "\n      ".join(map(str, files)))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A prompt pool (.safetensors), or a folder that 'ensemble' wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")] = False,
) -> None:
    """Show what a prompt pool, or the result of an ensemble, holds."""
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult

    if path.is_dir():
        result = EnsembleResult.load(path)
        if as_json:
            _print_json({"weights": dict(zip(result.names, result.weights.tolist(), strict=True))} | _numbers(result))
        else:
            _print_result(result, path.name)
        return
    pool = PromptPool.load(path)
    if as_json:
        backbone = None if pool.backbone is None else pool.backbone.to_dict()
        shapes = {name: list(prompt.shape) for name, prompt in pool.items()}
        _print_json({"prompts": shapes, "backbone": backbone, "metadata": pool.metadata})
    else:
        _print_pool(pool)


def main() -> None:
    """Entry point: errors of hgprompt in one line, without a traceback. Exit codes: 1 error, 2 usage, 130 Ctrl-C."""
    from hgprompt.errors import HGPromptError

    try:
        code = app(standalone_mode=False)
    except HGPromptError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        show = getattr(error, "show", None)  # the usage errors of the command line library
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    if code == 130:  # Typer's own answer to Ctrl-C
        typer.secho("interrupted; nothing was written", fg="red", err=True)
    sys.exit(code if isinstance(code, int) else 0)


def _backbone(
    pool: PromptPool, name: str | None, weights: Path | None, device: str | None, dtype: str | None
) -> FrozenViT:
    import torch

    from hgprompt.backbone import FrozenViT
    from hgprompt.errors import BackboneError, OptionError

    if name is None and pool.backbone is None:
        raise BackboneError("this pool names no backbone: give --backbone")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype is not None and dtype not in kinds:
        raise OptionError(f"--dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    options: dict[str, Any] = {} if pool.backbone is None else {"img_size": pool.backbone.image_size}
    known = pool.backbone.name if pool.backbone is not None else ""
    return FrozenViT.from_timm(
        name or known,
        checkpoint=None if weights is None else str(weights),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=None if dtype is None else kinds[dtype],
        **options,
    )


def _shrinkage(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def _numbers(result: EnsembleResult) -> dict[str, Any]:
    keys = (
        "h_score", "uniform_h_score", "alignment_loss", "objective", "gap", "converged", "n_images", "n_classes",
        "n_gradient_images", "sample_h_score", "sample_h_score_mixed_prompt", "shrinkage_intensity", "lam",
    )  # fmt: skip
    return {"weight_std": dict(zip(result.names, result.weight_std.tolist(), strict=True))} | {
        key: getattr(result, key) for key in keys
    }


def _print_json(record: dict[str, Any]) -> None:
    from hgprompt.result import jsonable

    typer.echo(json.dumps(jsonable(record), indent=2, default=str, allow_nan=False))


def _print_result(result: EnsembleResult, title: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title=f"{escape(title)}: how much of each prompt", title_justify="left")
    table.add_column("prompt")
    for column in ("weight", "± std", "H alone", "gradient · mixture"):
        table.add_column(column, justify="right")
    table.add_column("")
    along = result.gradient_cosines @ result.weights
    norm = float((result.weights @ result.gradient_cosines @ result.weights).clamp_min(0).sqrt())
    for i in result.weights.argsort(descending=True).tolist():
        cosine = float(along[i]) / norm if norm > 0 else float("nan")
        row = (result.weights[i], result.weight_std[i], result.source_h_scores[i], cosine)
        bar = "█" * round(24 * float(result.weights[i]))
        table.add_row(escape(result.names[i]), *(f"{float(value):.3f}" for value in row), bar)
    console.print(table)
    console.print(
        f"H of the mixture {result.h_score:.3f}, of the uniform mixture {result.uniform_h_score:.3f}, at most "
        f"{result.n_classes - 1}; alignment loss {result.alignment_loss:.3f}; "
        f"{'converged' if result.converged else 'NOT converged'} to a gap of {result.gap:.1e}"
    )
    console.print(
        f"{result.n_images} images of {result.n_classes} classes, gradients from {result.n_gradient_images} of them; "
        f"on these, H of mixed features {result.sample_h_score:.3f}, of the mixed prompt "
        f"{result.sample_h_score_mixed_prompt:.3f}"
    )


def _print_pool(pool: PromptPool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    kind = "deep" if pool.is_deep else "shallow"
    console.print(f"{len(pool)} {kind} prompts of {pool.num_tokens} tokens, {pool.width} wide")
    if pool.backbone is None:
        console.print("backbone: not recorded")
    else:
        size = "×".join(map(str, pool.backbone.image_size))
        console.print(
            f"backbone: {pool.backbone.name}, depth {pool.backbone.depth}, {size} pixels, "
            f"weights {pool.backbone.fingerprint[:16] or 'not recorded'}"
        )
    table = Table()
    for column in ("prompt", "RMS", "provenance"):
        table.add_column(column, justify="right" if column == "RMS" else "left", overflow="fold")
    for name, prompt in pool.items():
        record = pool.metadata[name]
        provenance = ", ".join(f"{key} {value}" for key, value in record.items()) or "not recorded"
        table.add_row(escape(name), f"{float(prompt.square().mean().sqrt()):.3f}", escape(provenance))
    console.print(table)


if __name__ == "__main__":
    main()
