r"""The tables of docs/results.md from the committed files of results.

    python benchmarks/paper_tables.py paper-2026-11:suite paper-trained-2026-11:suite paper-float32-2026-11:suite
    python benchmarks/paper_tables.py paper-procedural-2026-11:procedural paper-trained-2026-11:procedural \
        paper-single-2026-11:procedural

Each argument is a file under benchmarks/results and one of its runs; where two have the same cell, the later one's is
taken. Printed are the table of accuracies, and HGPrompt's paired differences to every other row; --versus names other
rows to take from all, and --plot draws the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from hgprompt.files import file_name
from hgprompt.paper.bench import COMPARED, method_key
from hgprompt.paper.figures import plot_scores
from hgprompt.paper.paired import difference
from hgprompt.paper.tables import accuracy_table
from hgprompt.paper.tasks import TaskFolder

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="FILE:RUN")
    parser.add_argument("--versus", nargs="*", default=["HGPrompt"], help="rows that the others are subtracted from")
    parser.add_argument("--plot", type=Path, help="a picture of the table")
    parser.add_argument("--title", default="Table 1: every method on every task", help="of the picture")
    args = parser.parse_args()
    cells = {}
    for name in args.runs:
        file, _, run = name.partition(":")
        cells |= json.loads((RESULTS / f"{file}.json").read_text())["runs"][run]["cells"]
    cells = {key: cell for key, cell in cells.items() if "accuracies" in cell}
    tasks = [TaskFolder(task, task, "own", 0, {}, "") for task in sorted({key.rsplit(".", 1)[1] for key in cells})]
    rows = {}
    for name, method in COMPARED.items():
        found = {t.name: c for t in tasks if (c := cells.get(file_name(method_key(method, t.name))))}
        if len(found) == len(tasks):
            rows[name] = found
        elif found:
            print(f"left out, of {len(found)} of {len(tasks)} tasks: {name}", file=sys.stderr)
    for name in (name for name in args.versus if name not in rows):
        parser.error(f"{name} has no whole row there: there are {'; '.join(rows)}")
    accuracies = {name: {task: cell["accuracies"] for task, cell in row.items()} for name, row in rows.items()}
    parameters = {name: row[tasks[0].name]["num_parameters"] for name, row in rows.items()}
    table = accuracy_table("Method", accuracies, tasks, parameters=parameters)
    print(table.markdown())
    names = [task.name for task in tasks]
    for one in args.versus:
        print(f"\n| {one} − | difference | p | ahead |\n|---|---:|---:|---:|")
        for other in accuracies:
            if other != one:
                d = difference(accuracies[one], accuracies[other], names)
                ties = f", {d.ties} tie{'s' if d.ties > 1 else ''}" if d.ties else ""
                print(f"| {other} | {d.mean:+.1f} ± {d.error:.1f} | {d.p:.3f} | {d.ahead} of {d.runs}{ties} |")
    if args.plot:
        shown = {name: [(e.mean, e.std or 0.0) for e in entries] for name, entries in table.rows.items()}
        plot_scores(table.columns, shown, args.title, args.plot)


if __name__ == "__main__":
    main()
