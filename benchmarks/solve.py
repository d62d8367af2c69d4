"""Time and memory of what comes after the pass, from statistics to α and its errors, as N, M and h grow.

    python benchmarks/solve.py --out benchmarks/results/solve-2026-11.json --plot docs/images/solve.png

One of N (images), M (prompts) and h (feature width) is varied at a time around 2,000, 13 and 768. Every case runs in a
process of its own, and cases that the file has already are left alone, so that a run can be broken off and taken up
again. A process makes its statistics (not timed), solves once small to load the libraries, and then times in turn
`WeightProblem` with `solve` at λ = 1, and `jackknife`. Memory is what the process has resident at most (VmHWM, reset
just before the first timed solve; Linux) less what it has resident before.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

CENTRE = {"N": 2000, "M": 13, "h": 768}
RANGES = {
    "N": [200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000],
    "M": [2, 4, 8, 13, 32, 64, 128],
    "h": [192, 384, 512, 768, 1024],
}
CLASSES, FOLDS, LAM, BATCH = 10, 8, 1.0, 100
TARGET_SECONDS = 3.0


def make(n: int, m: int, h: int, seed: int = 0):
    """Statistics of features with a spectrum that decays, and Gram matrices of nearly orthogonal gradients.

    The features of all prompts share most of what is in an image, as those of one backbone do: a common part with
    class means, and for each prompt a third of that again on its own, class means included.
    """
    import torch

    from hgprompt.kernels.gram import grams_reference
    from hgprompt.statistics import EnsembleStatistics

    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, h + 1) ** -0.5
    rank = min(h, 64)
    common = torch.randn(CLASSES, h, generator=g) * scale
    own = torch.randn(m, CLASSES, h, generator=g) * scale
    mixing = torch.randn(m, rank, h, generator=g) / rank**0.5
    strength = 0.5 * torch.rand(m, 1, 1, generator=g)  # of the class means that are a prompt's own
    statistics = EnsembleStatistics(folds=FOLDS)
    for start in range(0, n, BATCH):
        labels = torch.randint(0, CLASSES, (min(BATCH, n - start),), generator=g)
        image = torch.randn(len(labels), h, generator=g) * scale
        shared = image + 0.25 * common[labels]
        noise = torch.randn(m, len(labels), rank, generator=g) @ mixing * scale
        noise += torch.randn(m, len(labels), h, generator=g) * (0.1 * scale)
        statistics.update(shared + strength * own[:, labels] + 0.3 * noise, labels)
    gradients = torch.randn(FOLDS, m, 10 * h, generator=g) + 0.15 * torch.randn(10 * h, generator=g)
    gram, without_fold = grams_reference(gradients)
    return statistics, gram, list(without_fold)


def resident(what: str) -> int:
    """Bytes of this process in memory, of Linux: "VmRSS" now, "VmHWM" at most since the peak was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def measure(n: int, m: int, h: int, repeats: int, budget: float) -> dict:
    """One case: medians of at most `repeats` solves, fewer where they take longer than `budget` seconds together."""
    import torch

    from hgprompt.optimize import WeightProblem

    small = make(100, 2, 192)
    WeightProblem(*small[:2]).solve(LAM)
    statistics, gram, without_fold = make(n, m, h)
    if statistics.keeps == "features":
        statistics.features_and_labels()  # joins the batches, which is no part of what is timed
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    seconds, cpu, jackknife, jackknife_cpu, peaks = [], [], [], [], []
    begun = time.perf_counter()
    while len(seconds) < repeats and (not seconds or time.perf_counter() - begun < budget):
        wall, process = time.perf_counter(), time.process_time()
        problem = WeightProblem(statistics, gram)
        solution = problem.solve(LAM)
        seconds.append(time.perf_counter() - wall)
        cpu.append(time.process_time() - process)
        peaks.append(resident("VmHWM"))
        wall, process = time.perf_counter(), time.process_time()
        problem.jackknife(solution, without_fold, LAM)
        jackknife.append(time.perf_counter() - wall)
        jackknife_cpu.append(time.process_time() - process)
    found = solution.diagnostics
    return {
        "N": n, "M": m, "h": h, "keeps": statistics.keeps, "kept_MB": statistics.nbytes / 1e6,
        "seconds": median(seconds), "all_seconds": seconds, "cpu_seconds": median(cpu),
        "jackknife_seconds": median(jackknife), "jackknife_cpu_seconds": median(jackknife_cpu),
        "extra_MB": (peaks[0] - before) / 1e6,
        "extra_with_jackknife_MB": (resident("VmHWM") - before) / 1e6,
        "evaluations": found.evaluations, "gap": found.gap, "converged": found.converged,
        "h_score": found.h_score, "intensity": found.intensity, "threads": torch.get_num_threads(),
    }  # fmt: skip


def cases() -> list[dict[str, int]]:
    """The points of all three ranges, the cheapest first, the common one once."""
    points = [{**CENTRE, letter: value} for letter, values in RANGES.items() for value in values]
    points = [dict(p) for p in {tuple(sorted(p.items())) for p in points}]
    return sorted(points, key=lambda p: (p["N"] * p["M"] * p["h"] * max(p["M"], 13) * p["h"], p["N"]))


def rows_along(rows: list[dict], letter: str) -> list[dict]:
    """The measured cases in which only this letter differs from the centre, ascending."""
    fixed = {k: v for k, v in CENTRE.items() if k != letter}
    inside = [r for r in rows if "seconds" in r and all(r[k] == v for k, v in fixed.items())]
    return sorted(inside, key=lambda r: r[letter])


def exponent(rows: list[dict], letter: str, quantity: str) -> float | None:
    """e of quantity ~ letter^e: least squares of the logarithms over the upper half of the range."""
    upper = [r for r in rows_along(rows, letter) if r[quantity] > 0]
    upper = upper[len(upper) // 2 :]
    if len(upper) < 2:
        return None
    x, y = ([math.log(r[key]) for r in upper] for key in (letter, quantity))
    centre = sum(x) / len(x)
    return sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x)


def run(arguments: argparse.Namespace) -> dict:
    """Measure what is missing, and write the file after every case."""
    import torch

    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    record |= {
        "command": "python benchmarks/solve.py", "torch": version("torch"), "classes": CLASSES, "folds": FOLDS,
        "lam": LAM, "gap_tolerance": 1e-6, "threads": torch.get_num_threads(), "target_seconds": TARGET_SECONDS,
        "centre": CENTRE, "ranges": RANGES, "cap_seconds": arguments.cap,
    }  # fmt: skip
    known = {(r["N"], r["M"], r["h"]) for r in record["rows"]}
    begun = time.perf_counter()
    for case in cases():
        key = case["N"], case["M"], case["h"]
        left = arguments.total - (time.perf_counter() - begun)
        if key in known or left < arguments.cap:
            continue
        command = [sys.executable, __file__, "--case", *map(str, key), "--repeats", str(arguments.repeats)]
        try:
            done = subprocess.run(command, check=True, capture_output=True, timeout=arguments.cap, text=True)
            row = json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            row = {**case, "left_out": f"took longer than {arguments.cap:.0f} s"}
        record["rows"].append(row)
        record["exponents"] = {
            letter: {q: exponent(record["rows"], letter, q) for q in ("seconds", "jackknife_seconds", "kept_MB")}
            for letter in RANGES
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return record


def plot(record: dict, path: Path) -> None:
    """Two rows, time and memory; three columns, N, M and h."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = {"seconds": ("to α", "#1f5aa6", "o"), "jackknife_seconds": ("its jackknife errors", "#d0702a", "s")}
    memory = {"extra_MB": ("while solving", "#1f5aa6", "o"), "kept_MB": ("kept by the pass", "#777777", "^")}
    names = {"N": "N, images", "M": "M, prompts", "h": "h, feature width"}
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), sharey="row", sharex="col", layout="constrained")
    for column, letter in enumerate(RANGES):
        rows = rows_along(record["rows"], letter)
        x = [r[letter] for r in rows]
        for row, quantities in enumerate((lines, memory)):
            axis = axes[row][column]
            for key, (label, colour, marker) in quantities.items():
                # What solving takes beside is memory that the pass has freed, in part: no law to be read from it.
                slope = None if key == "extra_MB" else exponent(record["rows"], letter, key)
                power = "" if slope is None else f"  ~ {letter}$^{{{slope:.1f}}}$"
                axis.loglog(
                    x,
                    [r[key] or math.nan for r in rows],
                    marker=marker,
                    color=colour,
                    label=label + power,
                    markersize=4,
                )
            axis.axvline(CENTRE[letter], color="#bbbbbb", linewidth=0.8, linestyle=":")
            axis.grid(alpha=0.25, which="major")
            axis.legend(frameon=False, fontsize=8, loc="upper left")
            axis.margins(y=0.25)
            axis.set_xticks(RANGES[letter], [f"{v:,}" for v in RANGES[letter]], fontsize=8, minor=False)
            axis.tick_params(axis="x", rotation=45, which="major")
            axis.minorticks_off()
        axes[0][column].axhline(TARGET_SECONDS, color="#444444", linewidth=0.8, linestyle="--")
        axes[1][column].set_xlabel(names[letter])
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("MB")
    figure.suptitle("After the pass: N = 2,000, M = 13, h = 768, one of them varied at a time", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("solve.json"))
    parser.add_argument("--plot", type=Path, help="draw what the file has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cap", type=float, default=120, help="seconds for one case, after which it is left out")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--case", type=int, nargs=3, metavar=("N", "M", "h"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.repeats, arguments.cap / 3)))
        return
    record = run(arguments)
    if arguments.plot:
        plot(record, arguments.plot)


if __name__ == "__main__":
    main()
