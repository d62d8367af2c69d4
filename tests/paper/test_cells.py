"""Cells: killed at any moment, shared among processes, refused where they are not the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hgprompt.errors import FileFormatError, OptionError
from hgprompt.paper.cells import Cell, Share, Store, run_cells

COUNT = 12
# Each cell appends a line to a log when it is about to finish: work that was done twice, or never, can be counted.
PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from paper_cells import cells, table
from hgprompt.paper.cells import Share, Store, run_cells
out = Path(sys.argv[1])
found = run_cells(Store(out), cells(out, float(sys.argv[2])), share=Share.of_environment())
if len(found) == {count}:
    (out / "table.json").write_text(table(found))
"""


def cells(out, pause=0.0):
    def work(i):
        def run(job):
            half = job.checkpoints / "half"
            if not half.exists():
                time.sleep(pause)
                half.write_text(str(i * i))
            time.sleep(pause)
            with (out / "log").open("a") as log:
                log.write(f"{i}\n")
            return {"value": int(half.read_text()) + i}

        return run

    return [Cell(f"cell {i}", {"i": i, "of": [COUNT]}, work(i), cost=1 + i % 3) for i in range(COUNT)]


def table(found):
    return json.dumps({key: found[key]["value"] for key in sorted(found)})


@pytest.fixture
def start(tmp_path):
    """Starts a process that works on the cells of a folder."""
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    (helpers / "paper_cells.py").write_text(Path(__file__).read_text())
    program = helpers / "program.py"
    program.write_text(PROGRAM.format(tests=str(helpers), count=COUNT))

    def start(out, pause, **environment):
        root = str(Path(__file__).parents[2])
        env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment
        return subprocess.Popen([sys.executable, program, out, str(pause)], env=env, stderr=subprocess.PIPE, text=True)

    return start


def _wait_for(condition, process):
    while not condition() and process.poll() is None:
        time.sleep(0.005)


def test_killed_again_and_again_it_ends_with_the_same_table(tmp_path, start):
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    expected = table(run_cells(Store(undisturbed), cells(undisturbed)))
    out = tmp_path / "out"
    out.mkdir()
    finished = 0
    rng = random.Random(0)
    for _ in range(3):
        process = start(out, 0.03)
        goal = finished + 2
        _wait_for(lambda goal=goal: len(list(out.glob("cells/*.json"))) >= goal, process)
        time.sleep(rng.random() * 0.06)  # somewhere within a cell
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        finished = len(list(out.glob("cells/*.json")))
        for path in out.glob("cells/*.json"):
            json.loads(path.read_text())  # whole
    assert finished < COUNT
    process = start(out, 0.0)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert (out / "table.json").read_text() == expected
    # What was finished before a kill was not done again: each kill can cost the one cell that was under way.
    log = (out / "log").read_text().split()
    assert {int(i) for i in log} == set(range(COUNT))
    assert len(log) <= COUNT + 3
    assert not list((out / "checkpoints").iterdir())


def test_two_processes_share_the_work_and_the_later_one_has_it_all(tmp_path, start):
    out = tmp_path / "out"
    out.mkdir()
    pair = [start(out, 0.01, RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    errors = [p.communicate(timeout=60)[1] for p in pair]
    assert [p.returncode for p in pair] == [0, 0], errors
    log = [int(i) for i in (out / "log").read_text().split()]
    assert sorted(log) == list(range(COUNT))  # each once
    assert (out / "table.json").is_file()


@pytest.mark.parametrize("world", [1, 2, 3, 5, 20])
def test_shares_are_a_partition_of_about_equal_cost(tmp_path, world):
    plan = cells(tmp_path)
    shares = [Share(rank, world).of(plan) for rank in range(world)]
    assert sorted(c.key for s in shares for c in s) == sorted(c.key for c in plan)
    costs = [sum(c.cost for c in s) for s in shares]
    # Dealt one by one to whoever has least, two shares differ by one cell at most.
    assert max(costs) - min(costs) <= max(c.cost for c in plan)


def test_finished_cells_are_not_run_again(tmp_path):
    first = run_cells(Store(tmp_path), cells(tmp_path))
    assert run_cells(Store(tmp_path), cells(tmp_path)) == first
    assert len((tmp_path / "log").read_text().split()) == COUNT
    (tmp_path / "cells" / Store(tmp_path).path(cells(tmp_path)[3]).name).unlink()
    assert run_cells(Store(tmp_path), cells(tmp_path)) == first
    assert (tmp_path / "log").read_text().split()[COUNT:] == ["3"]


def test_an_error_keeps_what_is_finished(tmp_path):
    def fail(_):
        raise ValueError("no")

    plan = cells(tmp_path)[:3]
    with pytest.raises(ValueError, match="no"):
        run_cells(Store(tmp_path), [*plan[:2], Cell("bad", {}, fail), plan[2]])
    assert set(Store(tmp_path).finished(plan)) == {"cell 0", "cell 1"}


def test_a_cell_of_another_identity_is_refused_before_any_work(tmp_path):
    run_cells(Store(tmp_path), cells(tmp_path)[:2])
    other = Cell("cell 1", {"i": 1, "of": [99]}, cells(tmp_path)[1].run)
    with pytest.raises(
        OptionError, match=r"made otherwise \(it differs in of, \[12\] and not \[99\]\): give another --out,"
    ):
        run_cells(Store(tmp_path), [cells(tmp_path)[5], other])
    assert (tmp_path / "log").read_text().split() == ["0", "1"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "hgprompt-cell"}', '{"identity": {}, "record": {}}'])
def test_damaged_cells_are_named(tmp_path, content):
    store = Store(tmp_path)
    run_cells(store, cells(tmp_path)[:1])
    store.path(cells(tmp_path)[0]).write_text(content)
    with pytest.raises(FileFormatError, match=r"delete it to do its work again"):
        run_cells(store, cells(tmp_path))


def test_one_process_for_one_share(tmp_path):
    def again(_):
        with pytest.raises(OptionError, match="another process is at work"):
            run_cells(Store(tmp_path), [])
        run_cells(Store(tmp_path), [], share=Share(1, 2))  # another share is another matter
        return {}

    run_cells(Store(tmp_path), [Cell("a", {}, again)])


def test_a_cell_that_another_process_is_at_is_left_to_it(tmp_path):
    # Two runs on one folder with different numbers of processes deal the cells differently: they meet.
    runs = []

    def meanwhile(_):
        runs.append("a")
        found = run_cells(Store(tmp_path), plan, share=Share(0, 2))  # the same cells, begun a second time
        found |= run_cells(Store(tmp_path), plan, share=Share(1, 2))
        assert list(found) == ["b"]
        return {"by": "first"}

    plan = [Cell("a", {}, meanwhile, cost=2), Cell("b", {}, lambda _: {"by": "second"})]
    assert run_cells(Store(tmp_path), plan) == {"a": {"by": "first"}, "b": {"by": "second"}}
    assert runs == ["a"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_process_that_is_done_takes_what_nobody_has_begun(tmp_path):
    plan = cells(tmp_path)
    mine, everything = Share(0, 3), {cell.key for cell in plan}
    assert len(run_cells(Store(tmp_path), plan, share=mine)) < len(plan)
    assert set(run_cells(Store(tmp_path), plan, share=Share(0, 3, helps=True))) == everything
    assert sorted(int(i) for i in (tmp_path / "log").read_text().split()) == list(range(COUNT))  # each once


def test_without_locks_each_keeps_to_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr("hgprompt.paper.cells._lock", lambda handle: None)  # a file system that has none
    plan = cells(tmp_path)
    run_cells(Store(tmp_path), plan, share=Share(0, 3, helps=True))
    mine = {int(cell.key.split()[1]) for cell in Share(0, 3).of(plan)}
    assert {int(i) for i in (tmp_path / "log").read_text().split()} == mine


def test_the_costliest_cells_are_dealt_first():
    plan = [Cell(f"{i}", {}, lambda _: {}, cost=cost) for i, cost in enumerate((1, 1, 1, 3))]
    shares = [Share(rank, 2).of(plan) for rank in range(2)]
    assert [sum(cell.cost for cell in share) for share in shares] == [3, 3]  # in the plan's order: 2 and 4
    assert sorted(cell.key for share in shares for cell in share) == ["0", "1", "2", "3"]


def test_what_another_process_finishes_meanwhile_is_not_done_again(tmp_path):
    store, done = Store(tmp_path), []

    def first(_):
        store.put(plan[1], {"by": "another"})
        return {}

    plan = [Cell("first", {}, first), Cell("second", {}, lambda _: done.append("again") or {})]
    assert run_cells(store, plan)["second"] == {"by": "another"}
    assert done == []


def test_checkpoints_of_a_finished_cell_are_cleaned_up(tmp_path):
    """A kill between a cell's file and its clean-up leaves checkpoints that nobody needs."""
    store, cell = Store(tmp_path), Cell("one", {}, lambda _: {"never": "run"})
    store.directory.mkdir()
    store.put(cell, {"value": 1})
    store.checkpoints(cell).mkdir(parents=True)
    assert run_cells(store, [cell])["one"] == {"value": 1}
    assert not store.has_checkpoints(cell)


def test_a_claim_outlives_another_processs_clean_up(tmp_path, monkeypatch):
    """Whoever had the cell deletes its folder between the making of it here and the opening."""
    store, cell, opened, left = Store(tmp_path), Cell("one", {}, lambda _: {}), os.open, iter([True])

    def gone_once(path, flags, *rest, **options):
        if str(path).endswith("one") and flags == os.O_RDONLY and next(left, False):
            Path(path).rmdir()
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", gone_once)
    with store.claimed(cell) as alone:
        assert alone
    assert next(left, None) is None  # it was deleted


def test_one_that_helps_does_not_wait_for_a_process_that_died(tmp_path):
    plan = cells(tmp_path)
    found = run_cells(Store(tmp_path), plan, share=Share(1, 2, helps=True), wait=True)  # rank 0 never came
    assert len(found) == len(plan)


@pytest.mark.parametrize(("local", "helps"), [("4", True), ("2", False), (None, False)])
def test_processes_of_several_machines_do_not_help(monkeypatch, local, helps):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if local is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert Share.of_environment() == Share(1, 4, helps=helps)


def test_names_that_differ_have_files_that_differ(tmp_path):
    plan = [Cell(key, {"key": key}, lambda _: {}) for key in ("a b", "a/b", "a_b", "A λ=1", "A λ=2", "x" * 300)]
    assert len({Store(tmp_path).path(cell) for cell in plan}) == len(plan)
    assert len(run_cells(Store(tmp_path), plan)) == len(plan)
    with pytest.raises(OptionError, match="names twice: a_b"):
        run_cells(Store(tmp_path), [plan[2], plan[2]])


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("x", "2"), ("-1", "2")])
def test_a_rank_that_is_none(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(OptionError, match="no share of the work"):
        Share.of_environment()
