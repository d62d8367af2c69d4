"""How results look on a terminal: one table, a few sentences, the files written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hgprompt.data import ImageDataset, LabelledImages
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult
    from hgprompt.selection import Selection
    from hgprompt.tuning import Comparison, TuneResult


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    from hgprompt.strict_json import jsonable

    typer.echo(json.dumps(jsonable(record), indent=2, default=str, allow_nan=False))


def print_files(files: Sequence[Path]) -> None:
    """The names of the files written, one per line."""
    typer.echo("wrote " + "\n      ".join(map(str, files)))


def print_starts(tune: Sequence[str], mixture: Path, best_single: str) -> None:
    """What to tune from now: the paper's start, and the one that led where images or epochs were few.

    tune: the command without its start. best_single: POOL:NAME of the prompt of the highest H.
    """
    typer.echo(
        f"tune from the mixture:\n  {shlex.join([*tune, '--start', str(mixture), '-o', str(mixture / 'tuned')])}\n"
        "with few images or epochs, from the prompt of the highest H under a fitted head, of all starts from a pool "
        "the best on real tasks:\n"
        f"  {shlex.join([*tune, '--start', best_single, '--head', 'fitted', '-o', str(mixture / 'tuned-best-single')])}"
    )


def ensemble_numbers(result: EnsembleResult) -> dict[str, Any]:
    """The numbers of an ensemble, JSON-able."""
    keys = (
        "h_score", "uniform_h_score", "alignment_loss", "objective", "gap", "converged", "n_images", "n_classes",
        "n_gradient_images", "sample_h_score", "sample_h_score_mixed_prompt", "shrinkage_intensity", "lam",
        "h_score_std", "weight_error", "stop_reason",
    )  # fmt: skip
    numbers = {key: getattr(result, key) for key in keys}
    return {**result.by_prompt(), "gradient_cosines": result.gradient_cosines.tolist(), **numbers}


def skipped_images(*images: LabelledImages | ImageDataset | None) -> dict[str, Any]:
    """{"skipped_images": …} of what could not be read, JSON-able; {} where that is nothing."""
    skipped = [part.skipped.to_dict() for part in images if part is not None and part.skipped is not None]
    return {"skipped_images": skipped} if skipped else {}


def print_memory(num_prompts: int, width: int, num_images: int, num_classes: int, itemsize: int) -> None:
    """On stderr, before the pass: what will be kept of its features."""
    from hgprompt.memory import footprint, in_words

    sizes = footprint(num_prompts, width, num_images, num_classes=num_classes, itemsize=itemsize)
    kept, other = sorted(sizes, key=lambda kind: sizes[kind].kept)
    typer.echo(
        f"{num_prompts} prompts × {num_images} images: {in_words(sizes[kept].kept)} of {kept} to keep "
        f"({other} would take {in_words(sizes[other].kept)})",
        err=True,
    )


def print_ensemble(result: EnsembleResult, title: str) -> None:
    """The weights and their reasons."""
    from rich.markup import escape

    console, table = _table(f"{title}: how much of each prompt")
    aligned = result.n_gradient_images > 0
    table.add_column("prompt")
    for column in ("weight", "± std", "H alone", "± std", *(["gradient · mixture"] if aligned else [])):
        table.add_column(column, justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    along = result.gradient_cosines @ result.weights
    norm = float((result.weights @ result.gradient_cosines @ result.weights).clamp_min(0).sqrt())
    for i in result.weights.argsort(descending=True).tolist():
        cosine = [float(along[i]) / norm if norm > 0 else float("nan")] if aligned else []
        h, h_std = result.source_h_scores[i], result.source_h_score_std[i]
        row = [float(value) for value in (result.weights[i], result.weight_std[i], h, h_std)] + cosine
        bar = "█" * round(24 * float(result.weights[i]))
        table.add_row(escape(result.names[i]), *(f"{value:.3f}" for value in row), bar)
    console.print(table)
    console.print(
        f"H of the mixture {result.h_score:.3f} ± {result.h_score_std:.3f}, of the uniform mixture "
        f"{result.uniform_h_score:.3f}, at most {result.n_classes - 1}; "
        + (f"alignment loss {result.alignment_loss:.3f}; " if aligned else "")
        + f"{'converged' if result.converged else 'NOT converged'} to a gap of {result.gap:.1e}"
    )
    said = f"{result.n_images} images of {result.n_classes} classes{_how_it_stopped(result)}"
    if aligned:
        said += f"; gradients from {result.n_gradient_images} of them"
    if result.sample_h_score == result.sample_h_score:
        said += (
            f"; on these, H of mixed features {result.sample_h_score:.3f}, of the mixed prompt "
            f"{result.sample_h_score_mixed_prompt:.3f}"
        )
    console.print(said)
    for warning in _to_beware_of(result):
        console.print(warning)


def _to_beware_of(result: EnsembleResult) -> Iterator[str]:
    """What the numbers do not say by themselves."""
    if float(result.source_h_scores.min()) > 0.999 * (result.n_classes - 1):
        yield (
            "every prompt's H is at its most, so that H ranks nothing: these images are too few for an unshrunk "
            "covariance (--shrinkage auto)"
        )
    if len(result.names) > 1 and float(result.weights.max()) > 1 - 1e-6 and float(result.weight_std.max()) < 0.01:
        rank = float(result.source_rank_std[int(result.weights.argmax())])
        yield (
            "all weight is on one prompt, and its ± does not see another that might take its place with other images: "
            f"among the H of each alone, its rank is known to ± {rank:.2f}"
        )


def selection_numbers(selection: Selection) -> dict[str, Any]:
    """The numbers of a selection, JSON-able."""
    keys = ("h_score", "objective", "pairs", "share", "rounds", "regret")
    weights = dict(zip(selection.names, selection.weights.tolist(), strict=True))
    return {"weights": weights} | {key: getattr(selection, key) for key in keys}


def print_selection(selection: Selection, title: str, pool_size: int) -> None:
    """The prompts selected, and what it took to find them."""
    from rich.markup import escape

    console, table = _table(f"{title}: {len(selection.names)} of {pool_size} prompts")
    table.add_column("prompt")
    table.add_column("weight by H", justify="right")
    table.add_column("", no_wrap=True, overflow="crop")
    for name, weight in zip(selection.names, selection.weights.tolist(), strict=True):
        table.add_row(escape(name), f"{weight:.3f}", "█" * round(24 * weight))
    console.print(table)
    rounds = ", ".join(f"{prompts} from image {images + 1}" for images, prompts in selection.rounds)
    console.print(
        f"H of their mixture {selection.h_score:.3f}; {selection.pairs} images × prompts went through the network, "
        f"{100 * selection.share:.1f} % of all; prompts: {rounds}"
    )
    if selection.regret == selection.regret:
        console.print(f"regret against the choice from all prompts and images: {100 * selection.regret:.2f} %")


def _how_it_stopped(result: EnsembleResult) -> str:
    if result.stop_reason == "end of data":
        return ""
    return f", enough to know the weights to {result.weight_error:.3f} (L1)"


def print_pool(pool: PromptPool, title: str = "") -> None:
    """A pool's prompts and where they come from."""
    from rich.markup import escape

    console, table = _table(title)
    kind = "deep" if pool.is_deep else "shallow"
    console.print(f"{len(pool)} {kind} prompts of {pool.num_tokens} tokens, {pool.width} wide")
    if pool.backbone is None:
        console.print("backbone: not recorded")
    else:
        size = "×".join(map(str, pool.backbone.image_size))
        console.print(
            f"backbone: {escape(plain(pool.backbone.name))}, depth {pool.backbone.depth}, {size} pixels, "
            f"weights {escape(plain(pool.backbone.fingerprint[:16])) or 'not recorded'}"
        )
    for column in ("prompt", "RMS", "provenance"):
        table.add_column(column, justify="right" if column == "RMS" else "left", overflow="fold")
    for name, prompt in pool.items():
        provenance = ", ".join(_flat(pool.metadata[name])) or "not recorded"
        table.add_row(escape(name), f"{float(prompt.square().mean().sqrt()):.3f}", escape(provenance))
    console.print(table)


def print_tuned(result: TuneResult) -> None:
    """The course of a tuning run, of several the first: its first, some middle and the last epochs."""
    which = f", run {result.names[0]!r} of {len(result.names)}" if len(result.names) > 1 else ""
    console, table = _table(f"{result.task}: tuned with {result.backbone.name}{which}")
    table.add_column("epoch", justify="right")
    for name in ("loss", "training accuracy", "test accuracy"):
        table.add_column(name, justify="right")
    count = len(result.history)
    shown = sorted({0, count - 1, *(round(i * (count - 1) / 7) for i in range(8))})
    for record in (result.history[i] for i in shown):
        test = record.get("test_accuracy")
        table.add_row(
            str(record["epoch"]),
            f"{record['loss'][0]:.3f}",
            f"{100 * record['train_accuracy'][0]:.1f} %",
            "" if test is None else f"{100 * test[0]:.1f} %",
        )
    console.print(table)


def print_comparison(comparison: Comparison, title: str) -> None:
    """Accuracy of each start with its spread over the seeds, and the weights behind the mixture."""
    from rich.markup import escape

    from hgprompt.tuning.compare import SINGLE

    console, table = _table(f"{title}: accuracy on unseen images, mean ± standard deviation of {_seeds(comparison)}")
    table.add_column("start")
    last = len(comparison.curve_epochs) - 1
    points = sorted({0, last // 2, last})
    for epoch in (comparison.curve_epochs[i] for i in points):
        table.add_column(f"after {epoch} epoch{'s' if epoch > 1 else ''}", justify="right")
    table.add_column("last − uniform", justify="right")
    uniform = comparison.starts.index("uniform")
    best = int(comparison.curves[-1].mean(0).argmax())
    for k, name in enumerate(comparison.starts):
        cells = [_spread(comparison.curves[i, :, k]) for i in points]
        difference = (
            "" if k == uniform else _spread(comparison.curves[-1, :, k] - comparison.curves[-1, :, uniform], "+")
        )
        table.add_row(escape(name), *cells, difference, style="bold" if k == best else "")
    console.print(table)
    console.print(f"by chance {100 / comparison.num_classes:.1f}; {SINGLE}: {_most_common(comparison.singles)}")
    weights = [
        f"{escape(name)} {sum(float(e.weights[i]) for e in comparison.ensembles) / len(comparison.ensembles):.2f}"
        for i, name in enumerate(comparison.ensembles[0].names)
    ]
    console.print("HGPrompt took, on average: " + ", ".join(weights))
    console.print(_verdict(comparison))


def _verdict(comparison: Comparison) -> str:
    """One sentence of what came out, by the paired differences of the seeds."""
    last = comparison.curves[-1]
    ours, uniform, random = (last[:, comparison.starts.index(n)] for n in ("HGPrompt", "uniform", "random"))
    return (
        f"The mixed start {_compared(ours - random, 'a random one')}, and "
        f"{_compared(ours - uniform, 'the uniform mean of the pool')}, on the same images in the same order, with the "
        f"same head ({_seeds(comparison)})."
    )


_T_QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t at 97.5 % for 1, 2, … degrees of freedom: with few seeds, two standard errors are far from 95 %."""


def _compared(differences: Any, other: str) -> str:
    mean, count = 100 * float(differences.mean()), len(differences)
    if count == 1:
        return f"ended {mean:+.1f} points from {other}"
    quantile = _T_QUANTILES[min(count - 2, len(_T_QUANTILES) - 1)]
    half = quantile * 100 * float(differences.std()) / count**0.5
    how = "is not told apart from" if abs(mean) <= half else f"ended {'above' if mean > 0 else 'below'}"
    return f"{how} {other} ({mean:+.1f} points, 95 % interval {mean - half:+.1f} … {mean + half:+.1f})"


def _spread(values: Any, sign: str = "") -> str:
    mean = f"{100 * float(values.mean()):{sign}.1f}"
    return f"{mean} ± {100 * float(values.std()):.1f}" if len(values) > 1 else mean


def _seeds(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    return f"{count} seed{'s' if count > 1 else ''}"


def _most_common(names: Sequence[str]) -> str:
    from rich.markup import escape

    return escape(max(set(names), key=lambda name: (names.count(name), name)))


def _flat(record: dict[str, Any]) -> list[str]:
    """A prompt's record in short: nested entries one by one."""
    parts = []
    for key, value in record.items():
        if isinstance(value, dict):
            parts += _flat(value)
        elif value is not None:
            parts.append(plain(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"))
    return parts


def plain(text: str) -> str:
    """Without characters that steer a terminal: pools come from strangers."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _table(title: str) -> tuple[Console, Table]:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    return Console(emoji=False), Table(title=escape(plain(title)) or None, title_justify="left")
