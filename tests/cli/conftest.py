"""What the tests of the command line share."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from hgprompt.cli import main


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a command in this process: an import of torch sooner than in one of its own."""

    def run(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "140")
        monkeypatch.setattr(sys, "argv", ["hgprompt", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return SimpleNamespace(code=left.value.code, out=captured.out, err=captured.err)

    return run
