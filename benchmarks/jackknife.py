"""Errors of α by the jackknife, on made-up features: how large they are, and what they cost beside the solve.

    python benchmarks/jackknife.py --to RESULT.json

Sizes with many classes for the reduced basis are among them: there the folds' minima are looked for without it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from problems import data, random_gram, statistics_of

from hgprompt.files import write_text
from hgprompt.optimize import WeightProblem
from hgprompt.uncertainty import weight_error

FOLDS, SIGNAL = 8, 0.4
CASES = (
    ((500, 6, 160, 30), 1.0), ((400, 7, 192, 20), 0.1), ((400, 7, 192, 10), 1.0), ((2000, 13, 768, 10), 1.0),
    ((2000, 13, 768, 100), 1.0),
)  # fmt: skip
"""(N, M, h, C) and λ."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for shape, lam in CASES:
        statistics = statistics_of(*data(*shape, signal=SIGNAL), folds=FOLDS)
        gram = random_gram(shape[1], 0)
        began = time.perf_counter()
        problem = WeightProblem(statistics, gram)
        solution = problem.solve(lam)
        solved = time.perf_counter()
        weights = problem.jackknife(solution, [gram] * FOLDS, lam)
        seconds = {"solve_seconds": solved - began, "jackknife_seconds": time.perf_counter() - solved}
        rows.append({"N, M, h, C": shape, "lam": lam, "weight_error": weight_error(weights), **seconds})
        print(rows[-1], flush=True)
    about = {"command": "python benchmarks/jackknife.py", "torch": version("torch"), "threads": torch.get_num_threads()}
    write_text(args.to, json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
