"""Names come from strangers and go far: into files, figures, tables and terminals."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os

import hostile
import matplotlib
import pytest
import torch

from hgprompt import EnsembleResult, PromptPool
from hgprompt.backbone import create_model
from hgprompt.cli import _printable, show
from hgprompt.errors import BackboneError, FileFormatError, PromptError
from hgprompt.paper.cells import Cell, Store
from hgprompt.paper.tables import Entry, Table, csv_text, markdown
from hgprompt.pool import BackboneInfo, check_name

# Names that a pool may have, each with a meaning somewhere: paths, Rich, emoji, formulas, TeX, Markdown, spreadsheets.
MEANINGFUL = (
    "../../etc/passwd", "/etc/passwd", "..", "C:\\con", "[red]x[/red]", "[/]", "[link=http://a.b]c[/link]", ":skull:",
    "a\\", "$\\frac{1}$", "$$", "100 $", "\\input{/etc/passwd}", "|a|b|", "=1+1", "<script>", "a" * 200, "é",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    place = tmp_path_factory.mktemp("result")
    hostile._ensemble(place)
    small = EnsembleResult.load(place)
    m = len(MEANINGFUL)
    numbers = torch.rand(m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    named = {k: numbers.clone() for k in ("source_h_scores", "source_h_score_std", "source_rank_std", "weight_std")}
    cosines = torch.eye(m, dtype=torch.float64)
    return dataclasses.replace(
        small, names=MEANINGFUL, weights=numbers / numbers.sum(), gradient_cosines=cosines, **named
    )


@pytest.mark.parametrize(
    "name", ["\x1b[31m", "\x1b]0;t\x07", "a\nb", "a\rb", "\u202egnp", "\u2066a", "\u200b", "\u2028", "\ud800", "\0", ""]
)
def test_names_that_steer_a_terminal_are_none(name):
    with pytest.raises(PromptError, match="printable"):
        check_name(name)


def test_names_stay_in_the_folder(result, tmp_path):
    pool = PromptPool({name: torch.zeros(2, 6) for name in MEANINGFUL}, backbone=hostile.INFO)
    (tmp_path / "in").mkdir()
    pool.save(tmp_path / "in" / "pool.safetensors")
    assert PromptPool.load(tmp_path / "in" / "pool.safetensors").names == MEANINGFUL
    result.save(tmp_path / "in" / "out")
    assert EnsembleResult.load(tmp_path / "in" / "out").names == MEANINGFUL
    assert os.listdir(tmp_path) == ["in"]
    assert sorted(os.listdir(tmp_path / "in")) == ["out", "pool.safetensors"]


@pytest.mark.parametrize("key", ["..", ".", "../x", "/etc/x", ".hidden", "a/../../b"])
def test_cells_stay_in_their_folder(tmp_path, key):
    store, cell = Store(tmp_path), Cell(key, {}, dict)
    assert store.path(cell).resolve().parent == (tmp_path / "cells").resolve()
    assert store.checkpoints(cell).resolve().parent.parent == (tmp_path / "checkpoints").resolve()


def test_tables_show_names_as_they_are(result, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show.print_ensemble(result, "[bold]title")
        show.print_pool(PromptPool({name: torch.zeros(2, 6) for name in MEANINGFUL}))
    for name in MEANINGFUL:
        assert out.getvalue().count(name) >= 2, name
    assert "[bold]title" in out.getvalue()


def test_a_backbone_s_record_is_shown_and_not_interpreted():
    info = dataclasses.replace(hostile.INFO, name="[/red]", fingerprint="[/bold][red]")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show.print_pool(PromptPool({"a": torch.zeros(2, 6)}, backbone=info))
    assert "[/red]" in out.getvalue()
    assert "[/bold][red]" in out.getvalue()


def test_figures_show_names_as_they_are(result, tmp_path):
    """Neither a formula (which may not parse) nor TeX (which reads files), whatever the user's settings."""
    result.plot(tmp_path / "x.svg")
    with matplotlib.rc_context({"text.usetex": True}):
        result.plot(tmp_path / "y.svg")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        result.plot(tmp_path / "z.svg")
    text = (tmp_path / "z.svg").read_text()
    for shown in ("$\\frac{1}$", "$$", "100 $", "\\input{/etc/passwd}", "|a|b|", "&lt;script&gt;"):
        assert f">{shown}</text>" in text, shown


def test_markdown_and_spreadsheets_show_names_as_they_are():
    names = ("a|b", "[x](http://a.b)", "<img src=x>", "`c`", "=1+1", "-1", "@x")
    table = Table("task", names, {"=row|": tuple(Entry(50.0, None) for _ in names)}, {})
    header, _, row = table.markdown().splitlines()
    for line in (header, row):
        assert line.replace("\\|", "").count("|") == len(names) + 2
    assert "\\[x\\](http://a.b)" in header
    assert "\\<img src=x\\>" in header
    cells = [cell for line in table.csv().splitlines() for cell in line.split(",")]
    assert not any(cell.startswith(("=", "@", "-")) for cell in cells)
    # Tables that are not of accuracies: names may stand in any column of the CSV, and lead those of Markdown.
    assert csv_text(["=a"], [["x", "@b", -1.5]]) == "'=a\nx,'@b,-1.5\n"
    assert markdown(["a|", "b"], [["[x]", "-1"]]) == "| a\\| | b |\n|---|---:|\n| \\[x\\] | -1 |\n"


def test_errors_on_a_terminal_are_plain():
    assert _printable("a\x1b[2Jb\nc\u202e") == "a�[2Jb\nc�"


@pytest.mark.parametrize("name", ["hf-hub:some/model", "hf_hub:some/model", "local-dir:/tmp", "/tmp/model", "../x"])
def test_a_pool_cannot_name_a_place_to_load_weights_from(name):
    """timm would download from whoever the name says; only timm's own models are made by name."""
    with pytest.raises(BackboneError, match="knows no model"):
        create_model(name, True, None, {})


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": [4097, 32]}, {"image_size": [32, 10**30]}, {"std": [0.0, 1.0, 1.0]}, {"std": [-1.0]},
        {"mean": [1e300]}, {"mean": [0.5] * 65}, {"name": "\x1b[31m"}, {"name": "a" * 600}, {"fingerprint": "a\nb"},
        {"interpolation": "\u202e"}, {"interpolation": 5}, {"width": True}, {"depth": 0}, {"width": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_records_of_a_backbone(change):
    with pytest.raises(FileFormatError):
        BackboneInfo.from_dict(hostile.INFO.to_dict() | change)
