"""The recipe that writes procedural tasks as folders: what is read back is what was rendered."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

from hgprompt.data import decode, load_task, render_task
from hgprompt.paper.tasks import check_task

RECIPE = Path(__file__).parents[2] / "recipes" / "procedural_folders.py"


def test_folders_hold_what_was_rendered(tmp_path, monkeypatch, capsys):
    def run(*more):
        command = [RECIPE, tmp_path / "tasks", "--tasks", "sprite-x-location", "--size", "16", "--test", "40", *more]
        monkeypatch.setattr("sys.argv", [str(part) for part in command])
        runpy.run_path(str(RECIPE), run_name="__main__")
        return capsys.readouterr().out

    run()
    folder = tmp_path / "tasks" / "sprite-x-location"
    task = check_task(folder)  # splits are disjoint and add up, classes are known
    rendered = {
        "train800val200": render_task("sprite-x-location", 1000, image_size=16),
        "test": render_task("sprite-x-location", 40, image_size=16, split="test"),
    }
    for split, images in rendered.items():
        read = decode(load_task(folder, split), (16, 16))
        assert torch.equal(read.images, images.images)
        assert torch.equal(read.labels, images.labels)
        assert read.class_names == images.class_names
    assert [len(task.splits[name].samples) for name in ("train800", "val200")] == [800, 200]
    before = (folder / "test.txt").stat().st_mtime_ns
    assert run("--seed", "1") == ""  # what is there stays
    assert (folder / "test.txt").stat().st_mtime_ns == before
    assert [p.name for p in (tmp_path / "tasks").iterdir()] == ["sprite-x-location"]
