"""Progress: bars on a terminal, elsewhere a line now and then; what is done, and how long it will take."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from hgprompt import progress
from hgprompt.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_lines_and_not_too_many(clock, capsys):
    with Progress.of(True) as report:
        report("images", 0, 100)
        for done in range(1, 101):
            clock.now += 1
            report("images", done, 100, note="beside a bar")
        clock.now += 1
        report("weights", 0, None)
        clock.now += 30
        report("weights", 1, None)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "images: 30 of 100 (0:01:10 left); 0:00:30 so far", "images: 60 of 100 (0:00:40 left); 0:01:00 so far",
        "images: 90 of 100 (0:00:10 left); 0:01:30 so far", "weights: 1; 0:02:11 so far",
    ]  # fmt: skip


def test_work_that_goes_on_counts_what_was_done_now(clock, capsys):
    with Progress.of(True) as report:
        report("images", 80, 100)
        clock.now += 40
        report("images", 90, 100)
    assert capsys.readouterr().err == "images: 90 of 100 (0:00:40 left); 0:00:40 so far\n"


def test_what_is_not_finished_stays_beside_what_lies_in_it(clock, capsys):
    with Progress.of(True) as report:
        report("cells", 0, 3)
        for cell in range(1, 3):
            report("steps", 0, 10)
            clock.now += 20
            report("steps", 5, 10)
            clock.now += 20
            report("steps", 10, 10)
            report("cells", cell, 3, left=100.0)  # the last one is known to be longer
        report("testing", 0, 4)
        clock.now += 30
        report("testing", 1, 4)
    assert capsys.readouterr().err.splitlines() == [
        "cells: 0 of 3; 0:00:40 so far",
        "cells: 1 of 3 (0:01:00 left); 0:01:20 so far",
        "cells: 2 of 3 (0:01:10 left); testing: 1 of 4 (0:01:30 left); 0:01:50 so far",
    ]


def test_bars_come_and_go(clock, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    bars = progress._Bars(console)
    with Progress(None, bars) as report:
        report("cells", 0, 2)
        for i in range(30):
            report(f"stage {i} of a long name", 0, 10)
            clock.now += 5
            report(f"stage {i} of a long name", 10, 10)
        report("stage 0 of a long name", 4, 10)
        clock.now += 6
        report("stage 0 of a long name", 7, 10, note="loss 0.5")
        drawn = [(task.description, task.completed, task.fields["left"]) for task in bars._bars.tasks]
        bars._bars.refresh()
    assert drawn == [("cells", 0, "-:--:--"), ("stage 0 of a long…", 7, "0:00:06")]
    assert "loss 0.5" in screen.getvalue()


def test_what_is_said_inside_another_progress_is_said_whole():
    class View:
        def start(self):
            self.seen = []

        def show(self, stages, now):
            self.seen += [(stage.name, stage.done, stage.note, stage.left) for stage in stages]

        def stop(self):
            pass

    view = View()
    with Progress(None, view) as outer, Progress.of(outer) as inner:
        inner("tuning", 1, 10, "loss 0.5", left=42.0)
    assert view.seen == [("tuning", 1, "loss 0.5", 42.0)]


def test_silence_and_ones_own_function(capsys):
    seen = []
    for wanted in (False, lambda *given: seen.append(given)):
        with Progress.of(wanted) as report:
            report("images", 1, None)
    assert seen == [("images", 1, None)]
    assert capsys.readouterr() == ("", "")
