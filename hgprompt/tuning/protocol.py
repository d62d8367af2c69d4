"""VTAB's protocol: rates are chosen on val200, then all 1,000 images are trained on, and the test images seen once.

Grid points compete on train800, judged by the accuracy on val200 after the last epoch (ties: the smaller rate, then the
smaller decay); the winner trains anew on train800val200, once per seed (Zhai et al. 2019, and VPT). Every method gets
the same number of epochs; what it does beside them is its Cost.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgprompt.errors import DataError, FileFormatError, OptionError
from hgprompt.files import digest_of_tensors, make_directory, read_json, write_text
from hgprompt.progress import Progress, Reporter
from hgprompt.strict_json import is_number, jsonable
from hgprompt.tuning.checkpoint import digest_of_images
from hgprompt.tuning.config import Optimizer, TuneConfig
from hgprompt.tuning.method import Cost, Method, Prepared, Setting, identified
from hgprompt.tuning.prompts import identity_of
from hgprompt.tuning.trainer import Images, Trained, train

SEEDS = (42, 44, 82)
"""VPT's seeds of the final runs; the first is also that of the selection."""


@dataclass(frozen=True)
class Grid:
    """Base learning rates and weight decays that compete.

    Attributes:
        optimizer: None: what goes with the kind of method, AdamW for "fine-tune", else SGD.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    optimizer: Optimizer | None = None

    def configs(self, config: TuneConfig, kind: str) -> list[TuneConfig]:
        """The grid's points for a kind of method: everything but rate, decay and optimiser is config's."""
        optimizer = self.optimizer or ("adamw" if kind == "fine-tune" else "sgd")
        return [
            dataclasses.replace(config, lr=lr, head_lr=None, weight_decay=decay, optimizer=optimizer)
            for lr, decay in itertools.product(self.rates, self.decays)
        ]


_DECAYS = (0.01, 0.001, 0.0001, 0.0)
_RATES = (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05)
_QUICK = Grid((25.0, 10.0, 2.5, 0.5), (0.0001,))
_FINE_TUNE_RATES = (0.005, 0.001, 0.0005, 0.0001)
_QUICK_FINE_TUNE = Grid((0.32, 0.08, 0.02, 0.005, 0.001), (0.0001,))
GRIDS: dict[str, dict[str, Grid]] = {
    "full": {
        "prompt": Grid(_RATES, _DECAYS),
        "linear": Grid(_RATES, _DECAYS),
        "fine-tune": Grid(_FINE_TUNE_RATES, _DECAYS),
    },
    "rates": {
        "prompt": Grid(_RATES, (0.0001,)),
        "linear": Grid(_RATES, (0.0001,)),
        "fine-tune": Grid((0.32, 0.16, 0.08, 0.04, 0.02, 0.01, *_FINE_TUNE_RATES), (0.0001,)),
    },
    "quick": {"prompt": _QUICK, "linear": _QUICK, "fine-tune": _QUICK_FINE_TUNE},
    "quick-adamw": {
        "prompt": Grid((1.28, 0.32, 0.08, 0.02), (0.0001,), "adamw"),
        "linear": _QUICK,
        "fine-tune": _QUICK_FINE_TUNE,
    },
}
"""By name and kind of method: "full" is VPT's; "rates" has its rates and one weight decay; "quick" has four or
five. The last two are for short budgets, for which VPT's largest rate of trained networks is too small: theirs are
larger.
"quick-adamw" is "quick" with AdamW for prompts, as ATTEMPT's authors train theirs (0.3 at a batch of 64 is a base rate
of 1.2)."""

_FORMAT, _VERSION, _MAX_BYTES = "hgprompt-judged", 1, 2**22
# A run of a prompt is a few numbers, one of a fine-tuned network may be a copy of the network.
_RUNS_AT_ONCE = {"prompt": 64, "linear": 64, "fine-tune": 4}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A method on a task, as `select_and_retrain` found it.

    Attributes:
        method: its name. chosen: the config that won, with the first seed. grid: every point: lr, weight_decay,
            accuracy on val200 in 0 … 1 (0 for one that diverged).
        seeds, accuracies: on the test images, in 0 … 1, one of each seed; diverged: which of them did.
        num_parameters: trained numbers beside the head. epochs: of each run. images: that a final run trains on.
        cost: of preparing the final runs, all seeds together; selection_cost: of preparing the grid's.
        seconds: wall time of selection and of the final runs, preparation and evaluation included.
        report: of the method about the final runs.
    """

    method: str
    chosen: TuneConfig
    grid: tuple[dict[str, float], ...]
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    diverged: tuple[bool, ...]
    num_parameters: int
    epochs: int
    images: int
    cost: Cost
    selection_cost: Cost
    seconds: tuple[float, float]
    report: Mapping[str, object]

    @property
    def mean(self) -> float:
        """Of the accuracies over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Sample standard deviation of the accuracies over the seeds (n - 1); NaN for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan

    def record(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        record: dict[str, Any] = jsonable(dataclasses.asdict(self) | {"mean": self.mean, "std": self.std})
        return record


def select_and_retrain(
    method: Method,
    setting800: Setting,
    val200: Images,
    setting1000: Setting,
    test: Images,
    *,
    grid: str | Grid = "full",
    seeds: Sequence[int] = SEEDS,
    config: TuneConfig | None = None,
    runs_at_once: int | None = None,
    folder: str | Path | None = None,
    workers: int = 0,
    progress: bool | Reporter = False,
) -> Outcome:
    """Choose rates on val200, train anew on train800val200 with every seed, and test.

    Args:
        method: to be judged. setting800: with train800 as its images. setting1000: with train800val200.
        val200, test: images to choose on, and to report.
        grid: one of `GRIDS`, or base rates and decays.
        seeds: of the final runs; the first is that of the selection.
        config: epochs, batch size, warm-up and dropout of every run; None: TuneConfig().
        runs_at_once: grid points that train side by side; None: the method's own number, else 64 for prompts and heads,
            and 4 where a run may hold a copy of the network.
        folder: where to keep checkpoints, and what was judged; a call that was interrupted goes on from them, also
            with another number of threads, which gives starts other last bits. `seconds` of a part is what the call
            that finished it took.
        workers: processes that decode images that are not in memory. progress: as for `train`.

    Raises:
        DataError: every grid point diverged. OptionError: no such grid, or no seeds. And as the method and `train` do.
    """
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise OptionError(f"grid must be one of {sorted(GRIDS)} or a Grid, got {grid!r}")
        grid = GRIDS[grid][method.kind]
    points = grid.configs(config or TuneConfig(), method.kind)
    if not seeds or not points:
        raise OptionError("the protocol needs at least one seed, one rate and one decay")
    points = [dataclasses.replace(point, seed=seeds[0]) for point in points]
    if runs_at_once is not None and runs_at_once < 1:
        raise OptionError(f"runs_at_once must be at least 1, got {runs_at_once}")
    size = runs_at_once or method.runs_at_once or _RUNS_AT_ONCE[method.kind]
    folder = None if folder is None else make_directory(folder)
    parts: list[_Judged] = []
    with Progress.of(progress) as report:

        def run(setting: Setting, configs: Sequence[TuneConfig], images: Images, name: str) -> tuple[Prepared, Trained]:
            prepared = method.prepare(setting, configs)
            trained = train(
                prepared.learner, prepared.configs or configs, setting.train, images, num_classes=setting.num_classes,
                checkpoint=None if folder is None else folder / f"{method.name}-{name}.safetensors",
                identity=_identity(method, setting), starts_identified=True, workers=workers,
                progress=report, stage=f"{method.name}, {name}",
            )  # fmt: skip
            return prepared, trained

        def judge(chunk: Sequence[TuneConfig], name: str) -> _Judged:
            began = time.perf_counter()
            prepared, trained = run(setting800, chunk, val200, name)
            return _Judged(
                trained.accuracies, list(trained.diverged), prepared.cost, seconds=time.perf_counter() - began
            )

        for start in range(0, len(points), size):
            chunk, name = points[start : start + size], f"grid {start // size + 1}"
            if folder is None:
                parts.append(judge(chunk, name))
                continue
            file, identity = folder / f"{method.name}-{name}.json", _identity(method, setting800, chunk, val200)
            part = _Judged.read(file, identity, len(chunk))
            if part is None:
                part = judge(chunk, name)
                part.write(file, identity)
                (folder / f"{method.name}-{name}.safetensors").unlink(missing_ok=True)
            parts.append(part)
        if all(gone for part in parts for gone in part.diverged):
            raise DataError(f"{method.name} diverges at every point of its grid: smaller rates may help")
        accuracies = [accuracy for part in parts for accuracy in part.accuracies]
        judged = [
            {"lr": point.lr, "weight_decay": point.weight_decay, "accuracy": accuracy}
            for point, accuracy in zip(points, accuracies, strict=True)
        ]
        best = choose(judged)
        selected = time.perf_counter()
        chosen = points[best]
        finals = [dataclasses.replace(chosen, seed=seed) for seed in seeds]
        prepared, trained = run(setting1000, finals, test, "final")
    return Outcome(
        method=method.name,
        chosen=chosen,
        grid=tuple(judged),
        seeds=tuple(seeds),
        accuracies=tuple(trained.accuracies),
        diverged=trained.diverged,
        num_parameters=method.num_parameters(setting1000),
        epochs=len(trained.history),
        images=len(setting1000.train),
        cost=prepared.cost,
        selection_cost=sum((part.cost for part in parts), Cost()),
        seconds=(sum(part.seconds for part in parts), time.perf_counter() - selected),
        report=prepared.report,
    )


@dataclass(frozen=True)
class _Judged:
    """Grid points that were trained side by side, as they are kept in a file of a few numbers."""

    accuracies: list[float]
    diverged: list[bool]
    cost: Cost
    seconds: float

    def write(self, path: Path, identity: Mapping[str, Any]) -> None:
        about = {"format": _FORMAT, "version": _VERSION, "identity": dict(identity)}
        write_text(path, json.dumps(about | dataclasses.asdict(self), allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any], count: int) -> _Judged | None:
        """None where it is not there. FileFormatError: damaged. OptionError: of another run."""
        if not path.exists():
            return None
        stored = read_json(path, max_bytes=_MAX_BYTES)
        if not isinstance(stored, dict) or (stored.get("format"), stored.get("version")) != (_FORMAT, _VERSION):
            raise FileFormatError(f"{path} is no file of this version's protocol; delete it to judge again")
        if stored.get("identity") != json.loads(json.dumps(identity)):
            raise OptionError(f"{path} is of another run: choose another place, or delete it to begin again")
        fields: list[Any] = [stored.get(key) for key in ("accuracies", "diverged", "cost", "seconds")]
        accuracies, diverged, cost, seconds = fields
        if (
            not (isinstance(accuracies, list) and isinstance(diverged, list) and isinstance(cost, dict))
            or not (len(accuracies) == count and sorted(cost) == ["backward", "forward"] and is_number(seconds))
            or not all(map(is_number, [*accuracies, *cost.values()]))
            or [type(gone) for gone in diverged] != [bool] * count
        ):
            raise FileFormatError(f"{path}: its numbers are not understood; delete it to judge again")
        return cls(accuracies, diverged, Cost(**cost), float(seconds))


def _identity(
    method: Method, setting: Setting, configs: Sequence[TuneConfig] = (), judged_on: Images | None = None
) -> dict[str, Any]:
    """All that the starts of a method depend on; with configs and images to judge on, all that its grid does."""
    identity = identified(method) | identity_of(setting.backbone)
    identity |= {"tokens": setting.num_tokens, "deep": setting.deep, "classes": setting.num_classes}
    if setting.pool is not None:
        records = [[name, setting.pool.metadata[name].get("init_seed")] for name in setting.pool]
        identity["pool"] = [records, digest_of_tensors(setting.pool.values())]
    if judged_on is not None:
        identity |= {"train": digest_of_images(setting.train), "val200": digest_of_images(judged_on)}
        identity["configs"] = [dataclasses.asdict(config) for config in configs]
    return identity


def choose(judged: Sequence[Mapping[str, float]]) -> int:
    """Index of the highest accuracy; of equal ones the smaller rate, then the smaller decay."""
    return min(range(len(judged)), key=lambda i: (-judged[i]["accuracy"], judged[i]["lr"], judged[i]["weight_decay"]))
