"""Benchmarks: `python -m pytest benchmarks` (not part of the tests).

--benchmark-json=benchmarks/results/NAME.json keeps what was measured, and what makes it understandable.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the literal references


def pytest_benchmark_update_json(config, benchmarks, output_json):
    cpu = output_json["machine_info"].get("cpu", {})
    output_json["machine_info"] = {
        "cpu": cpu.get("brand_raw"),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{name: version(name) for name in ("torch", "timm", "numpy")},
    }
    output_json["commit_info"] = {k: output_json["commit_info"].get(k) for k in ("id", "dirty")}
    for entry in output_json["benchmarks"]:
        entry["stats"] = {k: entry["stats"][k] for k in ("median", "min", "max", "iqr", "rounds")}
        entry.pop("options", None)


@pytest.fixture
def paired(benchmark):
    """Time two functions in turn, so that a noisy machine slows both: benchmark what is ours, keep the ratio."""

    def run(ours, theirs, rounds=5):
        import statistics
        import time

        other = []

        def before_each_round():
            start = time.perf_counter()
            theirs()
            other.append(time.perf_counter() - start)

        theirs()
        benchmark.pedantic(ours, setup=before_each_round, rounds=rounds, warmup_rounds=1)
        other = other[1:]  # the first belongs to the warm-up
        median = statistics.median(other)
        ratios = [t / o for t, o in zip(other, benchmark.stats.stats.data, strict=False)]
        benchmark.extra_info |= {
            "peer_median_s": round(median, 4),
            "speedup_median": round(statistics.median(ratios), 3),
            "speedup_min": round(min(ratios), 3),
            "speedup_max": round(max(ratios), 3),
        }

    return run
