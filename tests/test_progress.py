"""Progress where there is no terminal: a line now and then, on stderr."""

from __future__ import annotations

from hgprompt import progress
from hgprompt.progress import Progress


def test_a_log_gets_lines_and_not_too_many(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress.of(True) as report:
        for done in range(1, 101):
            now += 1
            report("images", done, 100, note="beside a bar")
        now += 1
        report("weights", 0, None)
        now += 30
        report("weights", 1, None)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "images: 30 of 100, 30 s", "images: 60 of 100, 60 s", "images: 90 of 100, 90 s", "weights: 1, 131 s",
    ]  # fmt: skip


def test_silence_and_ones_own_function(capsys):
    seen = []
    for wanted in (False, lambda *given: seen.append(given)):
        with Progress.of(wanted) as report:
            report("images", 1, None)
    assert seen == [("images", 1, None)]
    assert capsys.readouterr() == ("", "")
