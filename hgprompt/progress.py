"""Progress on request: a bar on stderr, or the caller's own function."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_LONGEST = 18  # characters of a stage's name beside a bar
_SECONDS = 30.0  # between two lines of a log

Reporter = Callable[[str, int, int | None], None]
"""report(stage, done, total): total is None while it is unknown."""


class Progress:
    """Context manager around a Reporter; draws a bar, calls a function, or does nothing."""

    def __init__(self, reporter: Reporter | None, bar: Any = None) -> None:
        self._reporter = reporter
        self._bar = bar
        self._tasks: dict[str, Any] = {}

    @classmethod
    def of(cls, wanted: bool | Reporter) -> Progress:
        """False: silence. True: a bar, or where stderr is no terminal, a line now and then. A callable: that."""
        if callable(wanted):
            return cls(wanted)
        if not wanted:
            return cls(None)
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description:>9}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        console = Console(stderr=True)
        if not (console.is_terminal or console.is_jupyter):
            return cls(_Lines())
        return cls(None, Bar(*columns, console=console, transient=True))

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Report `done` of `total` units of a stage; the note stands beside a bar."""
        if self._reporter is not None:
            self._reporter(stage, done, total)
        if self._bar is not None:
            if stage not in self._tasks:
                shown = stage if len(stage) <= _LONGEST else stage[: _LONGEST - 1] + "…"
                self._tasks[stage] = self._bar.add_task(shown, total=total, note="")
            self._bar.update(self._tasks[stage], completed=done, total=total, note=note)


class _Lines:
    """A Reporter for logs: a line on stderr, at most one in `_SECONDS`."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            of = "" if total is None else f" of {total}"
            print(f"{stage}: {done}{of}, {now - self._began:.0f} s", file=sys.stderr, flush=True)
