"""Figures. Matplotlib (the extra `plots`) is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgprompt.errors import HGPromptError, OutputError

if TYPE_CHECKING:
    from hgprompt.result import EnsembleResult

# Okabe & Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"


def plot_ensemble(result: EnsembleResult, path: str | Path) -> None:
    """Weights with standard errors, H of each prompt alone beside the mixture's, and the gradient cosines.

    Args:
        result: what to draw. path: an image file; its suffix chooses the format.

    Raises:
        HGPromptError: Matplotlib is not installed. OutputError: the file cannot be written.
    """
    figure_class = _figure_class()
    order = result.weights.argsort(descending=True).tolist()
    names = [_shortened(result.names[i]) for i in order]
    m = len(names)
    has_gradients = bool(result.gradient_cosines.isfinite().all())
    height = max(3.2, 0.34 * m + 1.8)
    figure: Any = figure_class(figsize=(13 if has_gradients else 8.5, height), layout="constrained")
    axes = figure.subplots(1, 3 if has_gradients else 2, sharey=False)
    places = list(range(m))

    errors = result.weight_std[order].nan_to_num().numpy()
    axes[0].barh(places, result.weights[order].numpy(), color=BLUE, height=0.7)
    axes[0].errorbar(result.weights[order].numpy(), places, xerr=errors, fmt="none", ecolor="black", capsize=3)
    axes[0].axvline(1 / m, color=GREY, linestyle="--", linewidth=1)
    axes[0].annotate(" uniform", (1 / m, m - 0.32), color="0.3", fontsize=9, va="bottom")
    axes[0].set(title="How much of each prompt", xlabel="weight α (± jackknife standard error)", xlim=(0, None))

    scores = result.source_h_scores[order].numpy()
    axes[1].scatter(scores, places, color=ORANGE, s=45, label="prompt alone", zorder=3)
    axes[1].axvline(result.h_score, color=BLUE, label="this mixture")
    axes[1].axvline(result.uniform_h_score, color=GREY, linestyle="--", label="uniform mixture")
    axes[1].set(title=f"H-score (at most {result.n_classes - 1})", xlabel="H on the new task")
    axes[1].grid(axis="x", alpha=0.3)
    axes[1].legend(frameon=False, loc="best", fontsize=9)
    for axis in axes[:2]:
        axis.set_yticks(places, names)
        axis.set_ylim(m - 0.3, -0.6)
        axis.spines[["top", "right"]].set_visible(False)

    if has_gradients:
        cosines = result.gradient_cosines[order][:, order].numpy()
        picture = axes[2].imshow(cosines, cmap="PuOr", vmin=-1, vmax=1)
        axes[2].set_xticks(places, names, rotation=45, ha="right")
        axes[2].set_yticks(places, names)
        axes[2].set_title("Do the gradients agree? (cosines)")
        if m <= 14:
            for i in places:
                for j in places:
                    ink = "white" if abs(cosines[i, j]) > 0.65 else "black"
                    axes[2].text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
        figure.colorbar(picture, ax=axes[2], shrink=0.8)
    _save(figure, Path(path))


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HGPromptError("drawing needs Matplotlib: python -m pip install 'hgprompt[plots]'") from error
    return Figure  # without pyplot: no global state, no window


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write the figure {path}: {error}") from error


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
