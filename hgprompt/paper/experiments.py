"""The paper's tables and figures, each a list of cells and a way to write down what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hgprompt.errors import OptionError
from hgprompt.files import write_text
from hgprompt.paper.bench import COMPARED, method_cell, method_key, method_of
from hgprompt.paper.cells import Cell
from hgprompt.paper.embedding import NEIGHBOURS, embedding_cell, require_tsne
from hgprompt.paper.lab import Lab
from hgprompt.paper.paired import difference, least_p
from hgprompt.paper.tables import Table, accuracy_table, csv_text, escaped, markdown
from hgprompt.paper.tasks import canonical
from hgprompt.paper.weights import WEIGHING, cosines_cell, weights_cell
from hgprompt.tuning.methods import Partial

Records = Mapping[str, Mapping[str, Any]]
HGPROMPT, RAW, UNIFORM = "HGPrompt", "HGPrompt, raw H", "uniform"
_FEW = 7  # rows that dots beside one another can still be told apart in
LAMBDAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Request:
    """What is asked of an experiment: on which target tasks, with which methods (empty: the experiment's own)."""

    targets: tuple[str, ...]
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: of the command and the files. title: above the results.
        targets: the paper's target tasks; None: its 13, and your own. sources: tasks whose prompts it needs; None: the
            paper's 13 and your own.
        methods: that it compares unless asked otherwise; empty: it has no choice.
        cells: what has to be done. write: the files, from the records of all of them. check: raises before any work
            where something is missing that `write` needs.
    """

    name: str
    title: str
    cells: Callable[[Lab, Request], list[Cell]]
    write: Callable[[Lab, Request, Records], list[Path]]
    targets: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    methods: tuple[str, ...] = ()
    check: Callable[[], None] = lambda: None


# Tables 1 and 2

_ABLATION = {
    "– / –": UNIFORM,
    "H-score / –": f"{HGPROMPT} λ=0",
    "– / gradient": UNIFORM,  # Eq. 10 is least at uniform weights: this row is the first, not another run of it
    "H-score / gradient": HGPROMPT,
    "H-score / gradient, H as in Eq. 12": RAW,  # which is the paper's λ; the row above has C - 1 times as much
}


def _method_cells(lab: Lab, methods: Sequence[str], targets: Sequence[str]) -> list[Cell]:
    # Task by task: a process then has one task's images in memory for all of its methods.
    different = {method_of(method, lab.plan.lam).name: method for method in methods}.values()
    return [method_cell(lab, method, task) for task in targets for method in different]


def _of(lab: Lab, method: str, request: Request, records: Records) -> dict[str, Mapping[str, Any]]:
    """{task: record} of a method's cells."""
    names = [lab.task(task).name for task in request.targets]
    return {name: records[method_key(method_of(method, lab.plan.lam), name)] for name in names}


def _accuracies(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """{task: accuracies, one per seed}"""
    return {task: record["accuracies"] for task, record in found.items()}


def _table(lab: Lab, title: str, rows: Mapping[str, str], request: Request, records: Records) -> Table:
    found = {row: _of(lab, method, request, records) for row, method in rows.items()}
    accuracies = {row: _accuracies(of_tasks) for row, of_tasks in found.items()}
    parameters = {row: r["num_parameters"] for row, of_tasks in found.items() for r in of_tasks.values()}
    return accuracy_table(title, accuracies, [lab.task(t) for t in request.targets], parameters=parameters)


def _write_table1(lab: Lab, request: Request, records: Records) -> list[Path]:
    table = _table(lab, "Method", {m: m for m in request.methods}, request, records)
    pairs, files = _paired(lab, request, records)
    return [*_write_accuracies(lab, "table1", table, request.methods, request, records, pairs), *files]


def _paired(lab: Lab, request: Request, records: Records) -> tuple[list[str], list[Path]]:
    """Paragraphs and a file of how HGPrompt stands to every other row, pair by pair; none where it is not compared."""
    if HGPROMPT not in request.methods:
        return [], []
    tasks = [lab.task(task).name for task in request.targets]
    ours = _accuracies(_of(lab, HGPROMPT, request, records))
    rows: list[list[object]] = []
    for method in request.methods:
        if method == HGPROMPT:
            continue
        found = difference(ours, _accuracies(_of(lab, method, request, records)), tasks)
        rows.append([method, found.mean, found.error, found.p, found.ahead, found.ties, found.runs])
    if not rows:
        return [], []
    file = lab.out / "table1-paired.csv"
    write_text(file, csv_text(["method", "mean", "standard_error", "p", "ahead", "ties", "runs"], rows))
    shown = [
        [str(method), f"{mean:+.1f}" + ("" if error is None else f" ± {error:.1f}"), _digits(p),
         f"{ahead} of {runs}" + ("" if not ties else ", 1 tie" if ties == 1 else f", {ties} ties")]
        for method, mean, error, p, ahead, ties, runs in rows
    ]  # fmt: skip
    said = (
        f"Paired differences: {HGPROMPT} minus each of the others on the same task with the same seed, in percentage "
        f"points: mean over {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} ± its standard error. p: two-sided, "
        f"of flips of the tasks' signs; with so many tasks it is at least {least_p(len(tasks)):.2g}, and no correction "
        "for the number of rows is in it. Ahead: of all pairs of runs."
    )
    return [said, markdown([f"{HGPROMPT} −", "difference", "p", "ahead"], shown)], [file]


def _write_table2(lab: Lab, request: Request, records: Records) -> list[Path]:
    table = _table(lab, "H-score / gradient loss", _ABLATION, request, records)
    remark = (
        "The third row is the first: the alignment loss of Eq. 10 is least at uniform weights, whatever the gradients "
        "are, so alone it leaves the uniform mixture as it is."
    )
    methods = list(dict.fromkeys(_ABLATION.values()))
    return _write_accuracies(lab, "table2", table, methods, request, records, [remark])


def _write_accuracies(
    lab: Lab, name: str, table: Table, methods: Sequence[str], request: Request, records: Records,
    remarks: Sequence[str],
) -> list[Path]:  # fmt: skip
    from hgprompt.paper.figures import plot_dots, plot_scores

    files = _write_table(lab, name, table, methods, request, records, remarks)
    rows = {n: [(e.mean, e.std or 0.0) for e in entries] for n, entries in table.rows.items()}
    draw = plot_dots if len(rows) <= _FEW else plot_scores
    draw(table.columns, rows, EXPERIMENTS[name].title, lab.out / f"{name}.png")
    return [*files, lab.out / f"{name}.png"]


def _write_table(
    lab: Lab, name: str, table: Table, methods: Sequence[str], request: Request, records: Records,
    remarks: Sequence[str],
) -> list[Path]:  # fmt: skip
    """Of accuracies, with what has to be known to read it."""
    below = "Test accuracy in %."
    if len(table.rows) > 1:
        below += " Bold: best of a column, underlined: second best."
    if len(lab.plan.seeds) > 1:
        below += f" Mean ± standard deviation (n - 1) of {len(lab.plan.seeds)} seeds."
    remarks = [*remarks, *_at_the_edge(lab, methods, request, records), *_diverged(lab, request, records)]
    return _write_text(lab, name, table.markdown(), table.csv(), [below, *remarks], pool=uses_pool(methods))


def _digits(p: Any) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _at_the_edge(lab: Lab, methods: Sequence[str], request: Request, records: Records) -> list[str]:
    """A sentence for methods that might have done better with rates beyond the grid's largest or smallest."""
    remarks = []
    for edge, of, others in (("largest", max, "larger"), ("smallest", min, "smaller")):
        often = []
        for method in methods:
            of_tasks = _of(lab, method, request, records).values()
            at = sum(record["chosen"]["lr"] == of(point["lr"] for point in record["grid"]) for record in of_tasks)
            if 2 * at > len(of_tasks):
                often.append(f"{method} ({at} of {len(of_tasks)})")
        if often:
            said = f"Chose the grid's {edge} rate on most tasks, so that {others} ones may do better"
            remarks.append(f"{said}: {', '.join(often)}.")
    return remarks


def _diverged(lab: Lab, request: Request, records: Records) -> list[str]:
    """A sentence for final runs that came to nothing, which count as 0 % in means."""
    of_targets = {lab.task(task).name for task in request.targets}
    found = [
        f"{key} ({sum(record['diverged'])} of {len(record['diverged'])} seeds)"
        for key, record in records.items()
        if any(record.get("diverged", ())) and any(key.endswith(f".{name}") for name in of_targets)
    ]
    return [f"Diverged with the rates chosen, and counted as 0 %: {', '.join(found)}."] if found else []


# Figures 3 and 4


def _cells_fig3(lab: Lab, request: Request) -> list[Cell]:
    return [cosines_cell(lab, task) for task in request.targets]


def _write_fig3(lab: Lab, request: Request, records: Records) -> list[Path]:
    from hgprompt.paper.figures import plot_matrix

    names = lab.sources()
    stack, rows = [], []
    for task in request.targets:
        record = records[cosines_cell(lab, task).key]
        matrix = np.full((len(names), len(names)), np.nan)
        at = [names.index(n) for n in record["names"]]
        matrix[np.ix_(at, at)] = np.array(record["cosines"], dtype=float)
        stack.append(matrix)
        rows += [[task, names[i], names[j], matrix[i, j]] for i in at for j in at if i < j]
    counts = np.isfinite(stack).sum(0)
    mean = np.where(counts > 0, np.nansum(stack, axis=0) / np.maximum(counts, 1), np.nan)
    used = [i for i in range(len(names)) if counts[i, i]]
    shown = mean[np.ix_(used, used)]
    labels = [_title(lab, names[i]) for i in used]
    on = _title(lab, request.targets[0]) if len(stack) == 1 else f"mean over {len(stack)} target tasks"
    plot_matrix(shown, labels, f"Do the sources' gradients agree?\n({on})", lab.out / "fig3.png")
    apart = shown[~np.eye(len(used), dtype=bool)]
    below = [
        f"Cosines of the task loss' gradients under each source prompt, on the target's training images ({on}; a "
        f"target's own prompt is left out). Between different sources: mean {np.nanmean(apart):.3f}, least "
        f"{np.nanmin(apart):.3f}, largest {np.nanmax(apart):.3f}."
    ]
    table = markdown(["source", *labels], [[n, *map(_number, row)] for n, row in zip(labels, shown, strict=True)])
    text = csv_text(["target", "source", "other source", "cosine"], rows)
    files = _write_text(lab, "fig3", table, text, below)
    return [*files, lab.out / "fig3.png"]


def _cells_fig4(lab: Lab, request: Request) -> list[Cell]:
    return [weights_cell(lab, method, task) for task in request.targets for method in request.methods]


def _write_fig4(lab: Lab, request: Request, records: Records) -> list[Path]:
    from hgprompt.paper.figures import plot_weights

    sources = lab.sources()
    matrices = {}
    rows = []
    for method in request.methods:
        matrix = np.full((len(request.targets), len(sources)), np.nan)
        for t, task in enumerate(request.targets):
            record = records[weights_cell(lab, method, task).key]
            matrix[t] = [record["weights"][s] for s in sources]
            rows += [[method, task, s, w] for s, w in record["weights"].items()]
        matrices[method] = matrix
    targets, names = [_title(lab, t) for t in request.targets], [_title(lab, s) for s in sources]
    plot_weights(matrices, targets, names, lab.out / "fig4.png")
    lines = []
    for method, matrix in matrices.items():
        own = [matrix[t, sources.index(n)] for t, n in enumerate(request.targets) if n in sources]
        active = 1 / np.square(matrix).sum(1)
        diagonal = _number(float(np.mean(own))) if own else "–"
        lines.append([method, diagonal, _number(float(active.mean()), 1)])
    table = markdown(["method", "mean weight of the target's own prompt", "effective number of sources"], lines)
    below = [
        f"Weights over all {len(sources)} source prompts, the target's own among them (the diagonal). Effective number "
        "of sources: 1/Σα², mean over targets. HGPrompt: α. SPoT and PANDA: their scores of the sources over the sum "
        "(to start from, SPoT takes the best alone, PANDA the mean). ATTEMPT: its attention, mean over images, once "
        "it is trained by AdamW at its authors' rate."
    ]
    text = csv_text(["method", "target", "source", "weight"], rows)
    files = _write_text(lab, "fig4", table, text, below)
    return [*files, lab.out / "fig4.png"]


# Figure 5


def _sources_fig5(lab: Lab, target: str) -> tuple[str, ...]:
    return lab.sources(without=target)[:3]


def _cells_fig5(lab: Lab, request: Request) -> list[Cell]:
    return [embedding_cell(lab, task, _sources_fig5(lab, task)) for task in request.targets]


def _write_fig5(lab: Lab, request: Request, records: Records) -> list[Path]:
    from hgprompt.paper.figures import plot_embeddings

    files, lines, rows = [], [], []
    for task in request.targets:
        record = records[f"embedding.{lab.task(task).name}"]
        class_names = lab.task(task).splits["test"].class_names or ()
        labels = np.array(record["labels"])
        panels, notes = {}, {}
        for title, panel in record["panels"].items():
            kind, _, source = title.partition(" ")
            shown = f"{kind} {_title(lab, source)}" if kind == "source" else title
            panels[shown] = np.array(panel["points"])
            h, near = panel["h_score"], 100 * panel["neighbours"]
            notes[shown] = f"H {h:.2f}, {NEIGHBOURS} nearest neighbours {near:.1f} %"
            lines.append([_title(lab, task), escaped(shown), _number(h), _number(near, 1)])
            pairs = zip(panel["points"], record["labels"], strict=True)
            rows += [[task, shown, i, class_names[label], x, y] for i, ((x, y), label) in enumerate(pairs)]
        path = lab.out / ("fig5.png" if len(request.targets) == 1 else f"fig5-{lab.task(task).name}.png")
        plot_embeddings(panels, labels, class_names, notes, _title(lab, task), path)
        files.append(path)
    table = markdown(["target", "prompt", "H-score", f"{NEIGHBOURS} nearest neighbours, %"], lines)
    below = [
        "t-SNE of the features of test images under each start, before any tuning on the target. H and the accuracy of "
        "the nearest neighbours (leave-one-out) are of the features themselves."
    ]
    text = csv_text(["target", "prompt", "image", "class", "x", "y"], rows)
    written = _write_text(lab, "fig5", table, text, below)
    return [*written, *files]


# Figure 6


def _at(lam: float) -> str:
    """λ as the paper has it, beside an H that is not divided by C - 1."""
    return f"{RAW} λ={lam:g}"


def _cells_fig6(lab: Lab, request: Request) -> list[Cell]:
    return _method_cells(lab, [_at(lam) for lam in LAMBDAS], request.targets)


def _write_fig6(lab: Lab, request: Request, records: Records) -> list[Path]:
    from hgprompt.paper.figures import plot_lambda

    methods = {f"{lam:g}": _at(lam) for lam in LAMBDAS}
    table = _table(lab, "λ", methods, request, records)
    remark = "Tuned from the mixture that each λ of -H + λ L_align gives (Eq. 12)."
    files = _write_table(lab, "fig6", table, list(methods.values()), request, records, [remark])
    curves: dict[str, dict[float, Sequence[float]]] = {}
    for lam in LAMBDAS:
        for task, accuracies in _accuracies(_of(lab, _at(lam), request, records)).items():
            curves.setdefault(_title(lab, task), {})[lam] = accuracies
    plot_lambda(curves, lab.out / "fig6.png")
    return [*files, lab.out / "fig6.png"]


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "table1", "Table 1: every method on every task",
            lambda lab, r: _method_cells(lab, r.methods, r.targets), _write_table1, methods=tuple(COMPARED),
        ),
        Experiment(
            "table2", "Table 2: what each part of the objective adds",
            lambda lab, r: _method_cells(lab, list(_ABLATION.values()), r.targets), _write_table2,
            targets=(
                "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "eurosat", "dmlab", "smallnorb_azi",
            ),
        ),
        Experiment("fig3", "Figure 3: cosines of the sources' gradients", _cells_fig3, _write_fig3),
        Experiment(
            "fig4", "Figure 4: weights of the sources for each target", _cells_fig4, _write_fig4,
            methods=WEIGHING,
        ),
        Experiment(
            "fig5", "Figure 5: features under single sources and mixed", _cells_fig5, _write_fig5,
            targets=("eurosat",), sources=("cifar", "dtd", "oxford_iiit_pet"), check=require_tsne,
        ),
        Experiment(
            "fig6", "Figure 6: accuracy against λ", _cells_fig6, _write_fig6,
            targets=("cifar", "svhn", "clevr_dist", "clevr_count"),
        ),
    )
}  # fmt: skip


def uses_pool(methods: Sequence[str]) -> bool:
    """Whether any source prompt is needed; of an experiment that has no choice of methods, always."""
    return not methods or any(method_of(method).uses_pool for method in methods)


def make_request(experiment: Experiment, lab: Lab, targets: Sequence[str], methods: Sequence[str] = ()) -> Request:
    """Targets by their own names, and methods that the experiment can compare.

    Raises:
        OptionError: a method that is not known or that the backbone has too few blocks for, or a choice where there is
            none.
    """
    if methods and not experiment.methods:
        raise OptionError(f"{experiment.name} compares what the paper compares: it takes no --methods")
    for method in (method_of(name, lab.plan.lam) for name in methods):
        if isinstance(method, Partial) and method.k > lab.backbone.depth:  # now, and not behind all the sources
            raise OptionError(f"{method.name}: {lab.backbone.name} has {lab.backbone.depth} blocks")
    different = tuple({method_of(method, lab.plan.lam).name: method for method in methods}.values())
    return Request(tuple(dict.fromkeys(map(canonical, targets))), different or experiment.methods)


_NOT_OF = {"fig3": ("epochs", "grid", "lam", "test"), "fig4": ("grid", "test"), "fig5": ("epochs", "grid")}
"""Conditions that do not touch what a figure of one seed shows."""


def _title(lab: Lab, name: str) -> str:
    task = lab.suite.tasks.get(canonical(name))
    return name if task is None else task.title


def _write_text(lab: Lab, name: str, table: str, text: str, below: Sequence[str], *, pool: bool = True) -> list[Path]:
    """name.md, which says under which conditions the numbers hold, and name.csv. pool: whether sources are used."""
    plan, vit = lab.plan, lab.backbone
    kind = "deep" if plan.deep else "shallow"
    sources = _sources_said(lab) if pool else ""
    conditions = {
        "backbone": f"backbone {vit.name} at {vit.image_size[0]} pixels, weights {vit.fingerprint[:12]}",
        "dtype": str(vit.dtype).removeprefix("torch."),
        "tokens": _counted(plan.tokens, f"{kind} prompt token"),
        "sources": sources,
        "epochs": f"{_counted(plan.epochs, 'epoch')} on targets, batches of {plan.batch_size}",
        "grid": f"{plan.grid} grid",
        "lam": "λ as in each row" if name == "fig6" else f"λ = {plan.lam:g} (of -H/(C-1) + λ L_align)",
        "seeds": f"seed {plan.seeds[0]}"
        if name in _NOT_OF or len(plan.seeds) == 1
        else f"seeds {', '.join(map(str, plan.seeds))}",
        "test": "all test images"
        if plan.test_limit is None
        else f"at most {plan.test_limit} test images of a task, its classes in turn",
    }
    said = [text for what, text in conditions.items() if text and what not in _NOT_OF.get(name, ())]
    paragraphs = [f"# {EXPERIMENTS[name].title}", table.rstrip(), *below, f"Conditions: {'; '.join(said)}."]
    paragraphs += lab.suite.lines()
    write_text(lab.out / f"{name}.md", "\n\n".join(paragraphs) + "\n")
    write_text(lab.out / f"{name}.csv", text)
    return [lab.out / f"{name}.md", lab.out / f"{name}.csv"]


def _sources_said(lab: Lab) -> str:
    number, epochs = len(lab.sources()), lab.plan.source_epochs
    if lab.pool_given:
        return f"a pool of {number} given prompts"
    return f"{number} sources, {_counted(epochs, 'epoch')} on each"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _number(value: float, digits: int = 2) -> str:
    return "–" if value != value else f"{value:.{digits}f}"
