"""Tables of accuracies over methods and tasks, as Markdown and as CSV.

All numbers are percent: mean over seeds ± standard deviation with n - 1 in its denominator. The average over tasks is
taken for every seed first, so that its deviation is that of the average.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hgprompt.paper.tasks import GROUPS, TaskFolder


@dataclass(frozen=True)
class Entry:
    """A mean over seeds in percent; its standard deviation, None with one seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, accuracies: Sequence[float]) -> Entry:
        """Of accuracies in 0 … 1, one per seed."""
        percent = [100 * a for a in accuracies]
        return cls(statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.std is None else f" ± {self.std:.1f}")


@dataclass(frozen=True)
class Table:
    """Rows of entries.

    Attributes:
        title: of the column of row names. rows: {name: entries}, one entry for each of `columns`.
        parameters: {row name: trained numbers beside the head}; empty: no such column.
    """

    title: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[Entry, ...]]
    parameters: Mapping[str, int]

    def markdown(self) -> str:
        """Best of each column in bold, second best underlined, equal ones (as printed) alike."""
        marks = [self._marks(c) for c in range(len(self.columns))]
        rows = []
        for name, entries in self.rows.items():
            count = [_thousands(self.parameters.get(name))] if self.parameters else []
            rows.append([name, *count, *(_marked(e, marks[c]) for c, e in enumerate(entries))])
        return markdown([self.title, *(["Parameters"] if self.parameters else []), *self.columns], rows)

    def csv(self) -> str:
        """A column for each mean and each deviation, with all digits."""
        columns = [f"{c} {kind}" for c in self.columns for kind in ("mean", "std")]
        rows = []
        for name, entries in self.rows.items():
            count = [self.parameters.get(name, "")] if self.parameters else []
            numbers = [(e.mean, "" if e.std is None else e.std) for e in entries]
            rows.append([name, *count, *(number for pair in numbers for number in pair)])
        return csv_text([self.title, *(["parameters"] if self.parameters else []), *columns], rows)

    def _marks(self, column: int) -> list[str]:
        """The best and the second best mean, as printed."""
        means = sorted({round(entries[column].mean, 1) for entries in self.rows.values()}, reverse=True)
        return [f"{m:.1f}" for m in means[:2]] if len(means) > 1 else []


def accuracy_table(
    title: str,
    accuracies: Mapping[str, Mapping[str, Sequence[float]]],
    tasks: Sequence[TaskFolder],
    *,
    parameters: Mapping[str, int] | None = None,
) -> Table:
    """A table of methods × tasks.

    Args:
        title: of the column of row names.
        accuracies: {row: {task: accuracies in 0 … 1, one per seed}}.
        tasks: the columns, in order. parameters: {row: trained numbers}.
    """
    present = [g for g in GROUPS if any(task.group == g for task in tasks)]
    means = {g.capitalize(): [t for t in tasks if t.group == g] for g in present} if len(present) > 1 else {}
    if len(tasks) > 1:
        means["Average"] = list(tasks)
    rows = {}
    for row, of_task in accuracies.items():
        rows[row] = (*(Entry.of(of_task[t.name]) for t in tasks), *(_mean(of_task, part) for part in means.values()))
    return Table(title, (*(t.title for t in tasks), *means), rows, parameters or {})


def _mean(of_task: Mapping[str, Sequence[float]], tasks: Sequence[TaskFolder]) -> Entry:
    by_seed = zip(*(of_task[t.name] for t in tasks), strict=True)
    return Entry.of([statistics.fmean(values) for values in by_seed])


def _marked(entry: Entry, marks: Sequence[str]) -> str:
    rank = marks.index(f"{entry.mean:.1f}") if f"{entry.mean:.1f}" in marks else 2
    return (f"**{entry}**", f"<u>{entry}</u>", str(entry))[rank]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers. Names in the header and the first column are escaped
    here; what stands in the others is written as it is."""
    lines = ["| " + " | ".join(map(escaped, header)) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join([escaped(row[0]), *row[1:]]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same for a spreadsheet, which runs none of the names."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerows([no_formula(cell) if isinstance(cell, str) else cell for cell in row] for row in (header, *rows))
    return text.getvalue()


def escaped(name: str) -> str:
    """A name in a cell: tasks are named by folders, whose names may hold links, HTML or the cell's end."""
    return "".join("\\" + c if c in "\\|[]<>`*" else c for c in name)


def no_formula(name: str) -> str:
    """A name that a spreadsheet does not run."""
    return "'" + name if name[:1] in ("=", "+", "-", "@") else name


def _thousands(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
