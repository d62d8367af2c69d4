"""Gather what `hgprompt reproduce` found into one file of results.

    python benchmarks/paper_results.py OUT [OUT ...] --to RESULT.json --command "hgprompt …" --device "two cores"

Each folder becomes an entry: its cells, with the accuracy of every run, the rates that were chosen and on which grid,
costs, weights and seconds; and what all of them were made with. For the environment that made them: versions are
recorded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from hgprompt.files import write_text
from hgprompt.strict_json import jsonable

_LEFT_OUT = {"mean", "std", "chosen", "method", "selection_cost", "seeds", "points"}
"""Of a record: what its other numbers give, and 300 points of t-SNE a panel."""
_SHARED = ("recipe", "backbone", "dtype", "image_size", "tokens", "deep", "epochs", "batch_size", "seeds", "test_limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--command", required=True, help="that made the folders, for the reader")
    parser.add_argument("--device", required=True, help="what it ran on, in words")
    args = parser.parse_args()
    record = {
        "command": args.command,
        "device": args.device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm")},
        "runs": {folder.name: gather(folder) for folder in args.folders},
    }
    write_text(args.to, json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n")


def gather(folder: Path) -> dict[str, Any]:
    """What the cells of a folder share, and each cell."""
    cells = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "cells").glob("*.json"))}
    identities = [cell["identity"] for cell in cells.values()]
    shared = {}
    for name in _SHARED:
        values = [identity[name] for identity in identities if name in identity]
        if values and all(value == values[0] for value in values):
            shared[name] = values[0]
    return {"made with": shared, "cells": {key: _short(cell["record"]) for key, cell in cells.items()}}


def _short(record: Any) -> Any:
    """A cell's record in figures of six digits, without what is left out; accuracies whole, so that equal ones are."""
    if isinstance(record, dict):
        short = {key: _short(value) for key, value in record.items() if key not in _LEFT_OUT}
        if "accuracies" in record:
            short["accuracies"] = record["accuracies"]
        if "chosen" in record:
            short |= {name: record["chosen"][name] for name in ("lr", "weight_decay")}
        if "grid" in record:
            short["grid"] = _short([[point["lr"], point["accuracy"]] for point in record["grid"]])
        return short
    if isinstance(record, list):
        return [_short(value) for value in record]
    return float(f"{record:.6g}") if isinstance(record, float) else record


if __name__ == "__main__":
    main()
