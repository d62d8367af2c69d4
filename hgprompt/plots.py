"""Figures. Matplotlib is imported when one is drawn, and without pyplot: no global state, no window."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hgprompt.errors import OutputError
from hgprompt.files import write_bytes

if TYPE_CHECKING:
    from hgprompt.result import EnsembleResult
    from hgprompt.tuning.compare import Comparison
    from hgprompt.tuning.result import TuneResult

# Okabe & Ito's palette: told apart with any colour vision. Lines differ in dash and marker as well.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999",
)  # fmt: skip
LINES = (
    (GREY, ":", "o"), (ORANGE, "-.", "s"), (GREEN, "--", "^"), (BLUE, "-", "D"),
    (VERMILION, "-", "v"), (PURPLE, "--", "P"), (SKY, "-.", "X"),
)  # fmt: skip


def plot_ensemble(result: EnsembleResult, path: str | Path) -> None:
    """Weights with standard errors, H of each prompt alone beside the mixture's, and the gradient cosines.

    Args:
        result: what to draw. path: an image file; its suffix chooses the format.

    Raises:
        OutputError: the file cannot be written.
    """
    order = result.weights.argsort(descending=True).tolist()
    names = [shortened(result.names[i]) for i in order]
    m = len(names)
    has_gradients = bool(result.gradient_cosines.isfinite().all())
    side = max(3.4, 0.34 * m + 1.8)
    figure = new_figure((8.8 + side + 0.8) if has_gradients else 8.8, side)
    axes = figure.subplots(1, 3 if has_gradients else 2, width_ratios=[4, 4, side] if has_gradients else [1, 1])
    errors = result.weight_std[order].nan_to_num().numpy()
    _draw_weights(axes[0], names, result.weights[order].numpy(), errors, "± jackknife standard error")

    scores = result.source_h_scores[order].numpy()
    spread = result.source_h_score_std[order].nan_to_num().numpy()
    axes[1].errorbar(
        scores, range(m), xerr=spread, fmt="o", color=ORANGE, markersize=6.5, elinewidth=1.2, zorder=3,
        label="prompt alone ± std",
    )  # fmt: skip
    axes[1].axvline(result.h_score, color=BLUE, label="this mixture")
    axes[1].axvline(result.uniform_h_score, color=GREY, linestyle="--", label="uniform mixture")
    axes[1].set(title=f"H-score\n(at most {result.n_classes - 1})", xlabel="H on the new task")
    axes[1].grid(axis="x", alpha=0.3)
    axes[1].legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.75 / side - 0.02), fontsize=9, ncols=1)
    _prompt_rows(axes[1], names)
    if has_gradients:
        _draw_cosines(figure, axes[2], names, result.gradient_cosines[order][:, order].numpy())
    save_figure(figure, Path(path))


def plot_comparison(comparison: Comparison, title: str, path: str | Path) -> None:
    """Weights (mean and spread over seeds), gradient cosines (mean), and test accuracy after each epoch per start.

    Raises:
        OutputError: the file cannot be written.
    """
    weights = np.stack([e.weights.numpy() for e in comparison.ensembles])
    cosines = np.mean([e.gradient_cosines.numpy() for e in comparison.ensembles], axis=0)
    order = np.argsort(-weights.mean(0), kind="stable")
    names = [shortened(comparison.ensembles[0].names[i]) for i in order]
    has_gradients = bool(np.isfinite(cosines).all())
    figure = new_figure(15 if has_gradients else 10.5, max(4.4, 0.34 * len(names) + 2))
    ratios = [1, 1.15, 1.5] if has_gradients else [1, 1.5]
    axes = figure.subplots(1, len(ratios), width_ratios=ratios)
    seeds = len(comparison.seeds)
    spread = weights[:, order].std(0, ddof=1) if seeds > 1 else np.zeros(len(order))
    _draw_weights(axes[0], names, weights.mean(0)[order], spread, f"mean of {seeds} seeds ± standard deviation")
    if has_gradients:
        _draw_cosines(figure, axes[1], names, cosines[np.ix_(order, order)])
    chance = 100 / comparison.num_classes
    _draw_curves(axes[-1], comparison.starts, comparison.curve_epochs, comparison.curves.numpy(), chance)
    figure.suptitle(shortened(title, 80), fontsize=13)
    save_figure(figure, Path(path))


def plot_tuning(result: TuneResult, path: str | Path) -> None:
    """Loss and accuracies of one call of `tune`, epoch by epoch.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = new_figure(9.5, 3.8)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in result.history]
    for k, name in enumerate(result.names):
        colour, dash, marker = LINES[(k + 3) % len(LINES)]
        style = {"color": colour, "marker": marker, "markersize": 4, "markevery": max(1, len(epochs) // 12)}
        loss.plot(epochs, [r["loss"][k] for r in result.history], linestyle=dash, **style)
        train = [100 * r["train_accuracy"][k] for r in result.history]
        accuracy.plot(epochs, train, linestyle=":", color=colour, label=f"{shortened(name)}, training")
        tested = [(r["epoch"], 100 * r["test_accuracy"][k]) for r in result.history if "test_accuracy" in r]
        if tested:
            accuracy.plot(*zip(*tested, strict=True), linestyle=dash, label=f"{shortened(name)}, test", **style)
    for axis in (loss, accuracy):
        axis.xaxis.get_major_locator().set_params(integer=True)
    loss.set(title="Cross-entropy on training images", xlabel="epoch", ylim=(0, None))
    accuracy.set(title=f"Accuracy on {shortened(result.task)}", xlabel="epoch", ylabel="%")
    accuracy.legend(frameon=False, fontsize=9)
    for axis in (loss, accuracy):
        plain(axis)
    save_figure(figure, Path(path))


def _draw_curves(axis: Any, starts: Sequence[str], epochs: Sequence[int], curves: np.ndarray, chance: float) -> None:
    """Test accuracy [E, S, K] after each of `epochs`: mean of S seeds as a line, their range as a band; chance in %."""
    axis.axhline(chance, color="0.6", linewidth=1, linestyle=(0, (1, 3)))
    axis.annotate("by chance", (epochs[0], chance), color="0.4", fontsize=9, va="bottom")
    for k, name in enumerate(starts):
        colour, dash, marker = LINES[k % len(LINES)]
        mean = 100 * curves[:, :, k].mean(1)
        low, high = 100 * curves[:, :, k].min(1), 100 * curves[:, :, k].max(1)
        axis.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.plot(
            epochs, mean, color=colour, linestyle=dash, marker=marker, markersize=5, label=name,
            markevery=max(1, len(epochs) // 12),
        )  # fmt: skip
    seeds = curves.shape[1]
    axis.set(
        title=f"Tuned from each start (mean and range of {seeds} seeds)",
        xlabel="epoch",
        ylabel="accuracy on unseen images, %",
    )
    axis.set_xticks([epochs[i] for i in np.unique(np.linspace(0, len(epochs) - 1, 10).astype(int))])
    axis.legend(frameon=False, loc="lower right", fontsize=10)
    plain(axis)


def _draw_weights(axis: Any, names: Sequence[str], weights: np.ndarray, errors: np.ndarray, spread: str) -> None:
    m = len(names)
    axis.barh(range(m), weights, color=BLUE, height=0.7)
    axis.errorbar(weights, range(m), xerr=errors, fmt="none", ecolor="black", capsize=3)
    axis.axvline(1 / m, color=GREY, linestyle="--", linewidth=1)
    axis.annotate(" uniform", (1 / m, m - 0.32), color="0.3", fontsize=9, va="bottom")
    axis.set(title="How much\nof each prompt", xlabel=f"weight α ({spread})", xlim=(0, None))
    _prompt_rows(axis, names)


def _draw_cosines(figure: Any, axis: Any, names: Sequence[str], cosines: np.ndarray) -> None:
    m = len(names)
    picture = axis.imshow(cosines, cmap="PuOr", vmin=-1, vmax=1)
    upright = m > 8
    axis.set_xticks(range(m), names, rotation=90 if upright else 35, ha="center" if upright else "right")
    axis.set_yticks(range(m), [""] * m)  # the rows are those of the first panel
    axis.set_title("Do the gradients agree?\n(cosines)")
    if m <= 14:
        for i in range(m):
            for j in range(m):
                ink = "white" if abs(cosines[i, j]) > 0.65 else "black"
                axis.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(picture, ax=axis, shrink=0.8)


def _prompt_rows(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.3, -0.6)
    axis.spines[["top", "right"]].set_visible(False)


def plain(axis: Any) -> None:
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # names in it come from strangers: TeX could read files
        text.set_usetex(False)
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=150, format=path.suffix.removeprefix(".") or "png")
    except ValueError as error:  # a suffix that Matplotlib does not know
        raise OutputError(f"cannot write the figure {path}: {error}") from error
    write_bytes(path, drawn.getvalue())


def shortened(name: str, length: int = 24) -> str:
    """A name as a label: cut in the middle, for names often differ at their ends, and never read as a formula, which
    dollar signs would make it."""
    half = (length - 1) // 2
    short = name if len(name) <= length else f"{name[: length - 1 - half]}…{name[-half:]}"
    return short.replace("$", r"\$")
