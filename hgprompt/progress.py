"""Progress on request: bars on stderr, or the caller's own function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

_LONGEST = 18  # characters of a stage's name beside a bar
_SECONDS = 30.0  # between two lines of a log

Reporter = Callable[[str, int, int | None], None]
"""report(stage, done, total): total is None while it is unknown."""


@dataclass
class _Stage:
    """Of the work: how far it is.

    Attributes:
        first: units that were done when it began here; a run that goes on has some. began: then, in seconds.
        left: seconds until its end as whoever reports it knows; None: by what was done so far. seen: when it said so.
    """

    name: str
    first: int
    began: float
    done: int = 0
    total: int | None = None
    note: str = ""
    left: float | None = None
    seen: float = 0.0

    @property
    def over(self) -> bool:
        """Whether nothing more is to be heard of it: another stage may take its place."""
        return self.total is None or self.done >= self.total

    def seconds_left(self, now: float) -> float | None:
        """None where nothing says."""
        if self.left is not None:
            return max(0.0, self.left - (now - self.seen))
        if self.total is None or not self.first < self.done < self.total:
            return None
        rate = (self.done - self.first) / (self.seen - self.began or 1e-9)
        return max(0.0, (self.total - self.done) / rate - (now - self.seen))


class Progress:
    """Context manager around a Reporter; draws bars, writes lines, calls a function, or does nothing.

    Stages may lie within one another: what is not finished stays in view while others come and go.
    """

    def __init__(self, reporter: Reporter | None, view: _Bars | _Lines | None = None) -> None:
        self._reporter, self._view = reporter, view
        self._stages: dict[str, _Stage] = {}

    @classmethod
    def of(cls, wanted: bool | Reporter) -> Progress:
        """False: silence. True: bars, or where stderr is no terminal, a line now and then. A callable: that."""
        if callable(wanted):
            return cls(wanted)
        if not wanted:
            return cls(None)
        from rich.console import Console

        console = Console(stderr=True)
        return cls(None, _Bars(console) if console.is_terminal or console.is_jupyter else _Lines())

    def __enter__(self) -> Progress:
        if self._view is not None:
            self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.stop()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "", left: float | None = None) -> None:
        """Report `done` of `total` units of a stage; the note stands beside a bar.

        left: seconds until its end, of who knows better than by units done, which may be of unequal length.
        """
        if isinstance(self._reporter, Progress):
            self._reporter(stage, done, total, note, left)
        elif self._reporter is not None:
            self._reporter(stage, done, total)
        if self._view is None:
            return
        now, known = time.monotonic(), self._stages.get(stage)
        if known is None or done < known.done:  # new, or begun anew
            self._stages.pop(stage, None)
            self._stages = {name: other for name, other in self._stages.items() if not other.over}
            known = self._stages[stage] = _Stage(stage, done, now)
        known.done, known.total, known.note, known.left, known.seen = done, total, note, left, now
        self._view.show(list(self._stages.values()), now)


class _Bars:
    """A bar for each stage in view."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description:>9}", markup=False), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}", markup=False), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        self._bars: Any = Bars(*columns, console=console, transient=True)
        self._tasks: dict[int, tuple[_Stage, Any]] = {}

    def start(self) -> None:
        self._bars.start()

    def stop(self) -> None:
        self._bars.stop()

    def show(self, stages: list[_Stage], now: float) -> None:
        shown = {id(stage) for stage in stages}
        for key in [key for key in self._tasks if key not in shown]:
            self._bars.remove_task(self._tasks.pop(key)[1])
        for stage in stages:
            left = stage.seconds_left(now)
            fields = {"note": stage.note, "left": "-:--:--" if left is None else _clock(left)}
            if id(stage) not in self._tasks:
                name = stage.name if len(stage.name) <= _LONGEST else stage.name[: _LONGEST - 1] + "…"
                # The stage is kept beside its bar, so that its id is nobody else's.
                self._tasks[id(stage)] = stage, self._bars.add_task(name, total=stage.total, **fields)
            self._bars.update(self._tasks[id(stage)][1], completed=stage.done, total=stage.total, **fields)


class _Lines:
    """For logs: a line on stderr, at most one in `_SECONDS`."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def show(self, stages: list[_Stage], now: float) -> None:
        if now - self._last < _SECONDS:
            return
        self._last = now
        said = []
        for stage in [s for s in stages if s.total is None or s.done < s.total] or stages[-1:]:
            left = stage.seconds_left(now)
            of = "" if stage.total is None else f" of {stage.total}"
            said.append(f"{stage.name}: {stage.done}{of}" + ("" if left is None else f" ({_clock(left)} left)"))
        print(f"{'; '.join(said)}; {_clock(now - self._began)} so far", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
