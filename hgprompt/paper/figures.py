"""The paper's figures, drawn from the records of finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgprompt.plots import GREY, LINES, new_figure, plain, save_figure, shortened

Matrix = NDArray[np.float64]


def plot_matrix(matrix: Matrix, names: Sequence[str], title: str, path: str | Path) -> None:
    """Fig. 3: cosines of the sources' gradients, [M, M] in -1 … 1; NaN is left blank.

    Raises:
        OutputError: the file cannot be written.
    """
    size = max(4.4, 0.42 * len(names) + 1.9)
    figure = new_figure(size + 1.0, size)
    axis = figure.subplots()
    picture = axis.imshow(matrix, cmap="PuOr", vmin=-1, vmax=1)
    _cells(axis, matrix, names, names, threshold=0.65, digits=len(names) <= 14)
    axis.set_title(shortened(title, 200))
    figure.colorbar(picture, ax=axis, shrink=0.82, label="cosine similarity")
    save_figure(figure, Path(path))


def plot_weights(
    weights: Mapping[str, Matrix], targets: Sequence[str], sources: Sequence[str], path: str | Path
) -> None:
    """Fig. 4: how much each method takes of every source for every target; the most for a target in bold.

    Args:
        weights: {method: [T, M]}, rows on the simplex.
        targets, sources: names of rows and columns.

    Raises:
        OutputError: the file cannot be written.
    """
    columns = min(2, len(weights))
    rows = -(-len(weights) // columns)
    width, height = max(3.4, 0.36 * len(sources) + 1.6), max(2.6, 0.34 * len(targets) + 1.5)
    figure = new_figure(columns * width + 0.8, rows * height)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    largest = max(float(matrix.max()) for matrix in weights.values())
    picture = None
    for axis, (method, matrix) in zip(grid.flat, weights.items(), strict=False):
        picture = axis.imshow(matrix, cmap="Blues", vmin=0, vmax=largest)
        most = matrix == matrix.max(axis=1, keepdims=True)
        _cells(axis, matrix, targets, sources, threshold=0.55 * largest, digits=len(sources) <= 14, bold=most)
        axis.set_title(method)
    for axis in list(grid.flat)[len(weights) :]:
        axis.set_visible(False)
    for axis in grid[:, 0]:
        axis.set_ylabel("target")
    for axis in grid[-1]:
        axis.set_xlabel("source prompt")
    figure.colorbar(picture, ax=grid, shrink=0.7, label="weight α")
    save_figure(figure, Path(path))


def plot_embeddings(
    panels: Mapping[str, Matrix], labels: NDArray[np.int64], class_names: Sequence[str], notes: Mapping[str, str],
    target: str, path: str | Path,
) -> None:  # fmt: skip
    """Fig. 5: images as points, coloured by class.

    Args:
        panels: {title: coordinates [N, 2]}. labels: [N]. class_names: of the labels. notes: {title: a line below it}.
        target: name of the task whose images they are.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib import colormaps

    classes = np.unique(labels)
    shades = colormaps["tab20"].colors if len(classes) > 10 else colormaps["tab10"].colors  # type: ignore[attr-defined]
    marks = "os^DvP*Xp<"
    figure = new_figure(3.5 * len(panels), 4.8)
    figure.suptitle(f"Test images of {shortened(target)}, before any tuning on them")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for letter, axis, (title, points) in zip("ABCDEFGH", axes, panels.items(), strict=False):
        for k, c in enumerate(classes):
            of_class = points[labels == c]
            mark = marks[k // len(shades) % len(marks)]
            axis.scatter(
                of_class[:, 0], of_class[:, 1], s=9, color=shades[k % len(shades)], marker=mark, linewidths=0,
                alpha=0.85, label=shortened(class_names[c]),
            )  # fmt: skip
        axis.set(xticks=[], yticks=[], title=f"{letter}. {shortened(title, 34)}")
        axis.set_xlabel(notes.get(title, ""), fontsize=9)
        axis.set_box_aspect(1)
    if len(classes) <= 30:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(10, -(-len(classes) // -(-len(classes) // 10))),
            frameon=False, fontsize=8.5, markerscale=2,
        )  # fmt: skip
    save_figure(figure, Path(path))


def plot_lambda(curves: Mapping[str, Mapping[float, Sequence[float]]], path: str | Path) -> None:
    """Fig. 6: accuracy against λ.

    Args:
        curves: {task: {λ: accuracies in 0 … 1, one per seed}}; λ > 0.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = new_figure(6.6, 4.4)
    axis = figure.subplots()
    for k, (task, points) in enumerate(curves.items()):
        colour, dash, marker = LINES[(k + 3) % len(LINES)]
        lams = sorted(points)
        values = [100 * np.asarray(points[lam]) for lam in lams]
        axis.fill_between(
            lams, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.13, linewidth=0
        )
        axis.plot(
            lams, [v.mean() for v in values], color=colour, linestyle=dash, marker=marker, markersize=5,
            label=shortened(task),
        )  # fmt: skip
    axis.set_xscale("log")
    ticks = sorted({lam for points in curves.values() for lam in points})
    axis.set_xticks(ticks, [f"{lam:g}" for lam in ticks])
    axis.set_xticks([], minor=True)
    if ticks[0] < 1 < ticks[-1]:
        axis.axvline(1, color=GREY, linestyle="--", linewidth=1, zorder=0)
    seeds = max(len(accuracies) for points in curves.values() for accuracies in points.values())
    spread = f", mean and range of {seeds} seeds" if seeds > 1 else ""
    axis.set(xlabel="λ of Eq. 12", ylabel="test accuracy, %", title=f"Tuned from the mixture{spread}")
    plain(axis)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, Path(path))


def plot_dots(
    columns: Sequence[str], rows: Mapping[str, Sequence[tuple[float, float]]], title: str, path: str | Path
) -> None:
    """A table of few rows: each mean as a dot, with its deviation.

    Args:
        columns: names. rows: {name: (mean, std) in percent of each column}; None where something is not finished.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = new_figure(max(6.5, 0.85 * len(columns) + 3), 4.6)
    axis = figure.subplots()
    for k, (name, entries) in enumerate(rows.items()):
        colour, _, marker = LINES[k % len(LINES)]
        shift = (k - (len(rows) - 1) / 2) * min(0.11, 0.8 / len(rows))
        places = [c + shift for c in range(len(entries))]
        means, deviations = zip(*entries, strict=True)
        axis.errorbar(
            places, means, yerr=deviations if any(deviations) else None, fmt=marker, color=colour, markersize=5.5,
            elinewidth=1, capsize=2, label=shortened(name, 40),
        )  # fmt: skip
    for c in range(1, len(columns)):
        axis.axvline(c - 0.5, color="0.93", linewidth=1, zorder=0)
    upright = len(columns) > 8
    axis.set_xticks(range(len(columns)), columns, rotation=40 if upright else 0, ha="right" if upright else "center")
    axis.set(ylabel="test accuracy, %", title=title, xlim=(-0.6, len(columns) - 0.4))
    plain(axis)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    save_figure(figure, Path(path))


def plot_scores(
    columns: Sequence[str], rows: Mapping[str, Sequence[tuple[float, float]]], title: str, path: str | Path
) -> None:
    """A table of many rows: each mean as a number, its shade saying how far it is from the best of its column.

    Args and errors: as for `plot_dots`.
    """
    means = np.array([[mean for mean, _ in entries] for entries in rows.values()])
    behind = means - means.max(axis=0)
    figure = new_figure(0.62 * len(columns) + 3.2, 0.33 * len(rows) + 1.9)
    axis = figure.subplots()
    picture = axis.imshow(behind, cmap="Blues", vmin=-10, vmax=0, aspect="auto")
    for (i, j), value in np.ndenumerate(means):
        best, ink = behind[i, j] == 0, "white" if behind[i, j] > -4.5 else "0.15"
        weight = "bold" if best else "normal"
        axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color=ink, fontweight=weight)
    _names(axis, list(rows), columns, longest=32)
    axis.set_title(shortened(title, 200))
    figure.colorbar(picture, ax=axis, shrink=0.8, extend="min", label="points behind the best of the column")
    save_figure(figure, Path(path))


def _cells(
    axis: Any,
    matrix: Matrix,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    threshold: float,
    digits: bool,
    bold: NDArray[np.bool_] | None = None,
) -> None:
    """Names beside a heat map, and its numbers within; white ones on what is above the threshold."""
    _names(axis, rows, columns, longest=16)
    if not digits:
        return
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ink = "white" if abs(value) > threshold else "0.15"
            text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.0f}"
            text = text.replace("0.", ".", 1).replace("-.00", ".00").replace("-", "−")
            weight = "bold" if bold is not None and bold[i, j] else "normal"
            axis.text(j, i, text, ha="center", va="center", fontsize=7.5, color=ink, fontweight=weight)


def _names(axis: Any, rows: Sequence[str], columns: Sequence[str], *, longest: int) -> None:
    axis.set_xticks(range(len(columns)), [shortened(n, longest) for n in columns], rotation=50, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), [shortened(n, longest) for n in rows], fontsize=9)
    axis.spines[:].set_visible(False)
