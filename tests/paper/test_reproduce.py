"""The command on small tasks, from the folders to the files; and the figures by themselves."""

from __future__ import annotations

import csv
import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from vtab_folders import write_task

from hgprompt import OptionError, PromptPool, load_backbone
from hgprompt.cli import main
from hgprompt.paper import Lab, Plan, figures, find_suite, method_names
from hgprompt.paper.bench import COMPARED, method_key, method_of
from hgprompt.paper.embedding import neighbour_accuracy
from hgprompt.tuning import random_prompt
from hgprompt.tuning.methods import HGPrompt
from hgprompt.tuning.protocol import GRIDS, Grid

HAS_TSNE = importlib.util.find_spec("sklearn") is not None
FAST = (
    "--image-size", "16", "--tokens", "2", "--epochs", "1", "--source-epochs", "1", "--seeds", "1,2", "--grid", "quick",
    "--dtype", "float32", "--device", "cpu", "--quiet",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for name in ("ants", "bees", "cats", "owls"):
        write_task(root / name, sizes=(12, 6, 6))
    return root


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out") / "results"


@pytest.fixture
def reproduce(root, out, monkeypatch, capsys):
    # What is measured here is the road, not the methods: two rates are a choice.
    monkeypatch.setitem(GRIDS["quick"], "prompt", Grid((5.0, 1.0), (0.0001,)))

    def run(*arguments, code=0):
        command = ["hgprompt", "reproduce", *FAST, "--data-root", root, "--out", out, *arguments]
        monkeypatch.setattr("sys.argv", [str(a) for a in command])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        assert end.value.code == code, said.err
        return said.out if code == 0 else said.err

    return run


def _is_picture(path, least=300):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= least
        assert np.asarray(image.convert("L")).std() > 5  # not a blank page
    return True


def test_a_dry_run_says_what_is_to_do_and_does_nothing(reproduce, out):
    said = json.loads(reproduce("table1", "--tasks", "ants", "--methods", "VPT,uniform", "--dry-run", "--json"))
    assert said["to_do"] == [*(f"source.{n}" for n in ("ants", "bees", "cats", "owls")), "VPT.ants", "uniform.ants"]
    assert not out.exists()


def test_table1_and_what_the_experiments_share(reproduce, out):
    said = reproduce("table1", "--tasks", "ants,bees", "--methods", "VPT,uniform")
    assert "| VPT | 384 |" in said  # 2 tokens of width 192
    for name in ("table1.md", "table1.csv", "table1.png", "pool.safetensors"):
        assert str(out / name) in said
    assert _is_picture(out / "table1.png")
    text = (out / "table1.md").read_text()
    assert "2 shallow prompt tokens" in text
    rows = {row["Method"]: row for row in csv.DictReader((out / "table1.csv").open())}
    cell = json.loads((out / "cells" / "uniform.bees.json").read_text())["record"]
    assert float(rows["uniform"]["bees mean"]) == pytest.approx(100 * np.mean(cell["accuracies"]))
    # The pool has every task's prompt; the mixture for a task has all but its own, below.
    assert PromptPool.load(out / "pool.safetensors").names == ("ants", "bees", "cats", "owls")
    # Chosen on the validation images: the best of what was tried, of equal ones the smaller rate.
    best = max(v["accuracy"] for v in cell["grid"])
    rates = [v["lr"] for v in cell["grid"] if v["accuracy"] == best]
    assert cell["chosen"]["lr"] == min(rates)
    for method in ("VPT", "uniform"):
        records = [json.loads((out / "cells" / f"{method}.{t}.json").read_text())["record"] for t in ("ants", "bees")]
        for edge, of in (("largest", max), ("smallest", min)):
            at = sum(r["chosen"]["lr"] == of(point["lr"] for point in r["grid"]) for r in records)
            said_so = re.search(rf"Chose the grid's {edge} rate[^.]*{method} \(2 of 2\)", text)
            assert (said_so is not None) == (at == 2)

    before = {p.name: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    assert reproduce("table1", "--tasks", "ants,bees", "--methods", "VPT,uniform") == said
    reproduce("table2", "--tasks", "ants", "--sources", "ants,bees,cats,owls")
    after = {p.name: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    assert before.items() <= after.items()
    assert {*after} - {*before} == {f"HGPrompt{kind}.ants.json" for kind in ("", "-lambda-0", "-raw-H")}
    # Two rates compete, so every row chose an end of its grid on its one task.
    assert re.search(
        r"Chose the grid's (largest|smallest) rate[^.]*HGPrompt λ=0 \(1 of 1\)", (out / "table2.md").read_text()
    )

    said = reproduce("table1", "--tasks", "ants", "--methods", "HGPrompt,VPT,uniform")
    assert "Paired differences" in said
    (vpt, uniform) = csv.DictReader((out / "table1-paired.csv").open())
    assert (vpt["method"], uniform["method"]) == ("VPT", "uniform")
    of = {n: json.loads((out / "cells" / f"{n}.ants.json").read_text())["record"] for n in ("HGPrompt", "VPT")}
    gained = np.subtract(of["HGPrompt"]["accuracies"], of["VPT"]["accuracies"])
    assert float(vpt["mean"]) == pytest.approx(100 * gained.mean())
    report = json.loads((out / "cells" / "HGPrompt.ants.json").read_text())["record"]["report"]
    assert {seed: set(found["weights"]) for seed, found in report.items()} == {
        "seed 1": {"bees", "cats", "owls"}, "seed 2": {"bees", "cats", "owls"},
    }  # fmt: skip
    lines = (out / "table2.md").read_text().splitlines()
    first, third = (next(li for li in lines if li.startswith(f"| {row} |")) for row in ("– / –", "– / gradient"))
    assert first.split("|")[2:] == third.split("|")[2:]


def test_other_options_are_refused_and_not_mixed_in(reproduce, out):
    said = reproduce("table1", "--tasks", "ants", "--methods", "uniform", "--test-limit", "3", code=1)
    assert "made otherwise (it differs in test_limit, null and not 3)" in said.replace("\n", " ")


def test_results_of_an_older_revision_are_refused(reproduce, monkeypatch):
    monkeypatch.setattr(HGPrompt, "revision", HGPrompt.revision + 1)
    said = reproduce("table1", "--tasks", "ants", "--methods", "HGPrompt", code=1)
    assert f"made otherwise (it differs in revision, {HGPrompt.revision - 1} and not" in said.replace("\n", " ")
    reproduce("table1", "--tasks", "ants", "--methods", "uniform")  # which depends on none


def test_fig3_leaves_out_a_targets_own_prompt_and_fig4_does_not(reproduce, out):
    reproduce("fig3", "--tasks", "ants,bees")
    rows = list(csv.DictReader((out / "fig3.csv").open()))
    assert len(rows) == 2 * 3  # pairs of the three other sources, for two targets
    assert all(row["target"] not in (row["source"], row["other source"]) for row in rows)
    assert all(abs(float(row["cosine"])) <= 1 + 1e-9 for row in rows)  # float64, up to rounding
    assert _is_picture(out / "fig3.png")

    reproduce("fig4", "--tasks", "ants,bees")
    rows = list(csv.DictReader((out / "fig4.csv").open()))
    for method in ("SPoT", "ATTEMPT", "PANDA", "HGPrompt"):
        for target in ("ants", "bees"):
            weights = {r["source"]: float(r["weight"]) for r in rows if (r["method"], r["target"]) == (method, target)}
            assert set(weights) == {"ants", "bees", "cats", "owls"}
            assert sum(weights.values()) == pytest.approx(1)
    identity = json.loads((out / "cells" / "weights.ATTEMPT.ants.json").read_text())["identity"]
    assert identity["config"]["optimizer"] == "adamw"  # its authors' rate is one of AdamW
    assert _is_picture(out / "fig4.png")


@pytest.mark.skipif(not HAS_TSNE, reason="t-SNE is scikit-learn's")
def test_fig5(reproduce, out):
    reproduce("fig3", "--tasks", "cats", "--sources", "bees,owls")
    assert "nearest neighbours" in reproduce("fig5", "--tasks", "owls", "--sources", "ants,bees,cats")
    rows = list(csv.DictReader((out / "fig5.csv").open()))
    assert len(rows) == 4 * 6  # three sources and the mixture, six test images
    assert {row["class"] for row in rows} == {"class 0", "class 1", "class 2"}
    assert _is_picture(out / "fig5.png")
    # The folder's pool keeps the other experiment's prompt, which this one had no use for.
    assert set(PromptPool.load(out / "pool.safetensors").names) == {"ants", "bees", "cats", "owls"}


def test_fig5_says_at_once_what_it_lacks(reproduce, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "sklearn" else find(name, *more)
    )
    assert "pip install 'hgprompt[paper]'" in reproduce("fig5", "--tasks", "owls", code=1)


def test_fig6(reproduce, out):
    reproduce("fig6", "--tasks", "owls")
    rows = list(csv.DictReader((out / "fig6.csv").open()))
    cells = {p.name.removesuffix(".owls.json"): p for p in (out / "cells").glob("HGPrompt-raw-H*.owls.json")}
    lams = [key.removeprefix("HGPrompt-raw-H").removeprefix("-lambda-") or "1" for key in cells]
    assert sorted(map(float, lams)) == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert len(rows) == 7
    for row in rows:
        lam = float(row["λ"])
        (cell,) = (path for path, at in zip(cells.values(), lams, strict=True) if float(at) == lam)
        record = json.loads(cell.read_text())["record"]
        assert float(row["owls mean"]) == pytest.approx(100 * np.mean(record["accuracies"]))
    assert _is_picture(out / "fig6.png")
    text = (out / "fig6.md").read_text()
    assert "λ as in each row" in text
    assert "Average" not in text  # of one task
    assert "(n - 1) of 2 seeds" in text
    assert "Chose the grid's" in text


def test_wrong_wishes(reproduce, root, tmp_path):
    assert "there are table1, table2" in reproduce("table3", code=1)
    assert "no method is called 'SPOT'" in reproduce("table1", "--methods", "SPOT", "--tasks", "own", code=1)
    assert "takes no --methods" in reproduce("fig6", "--tasks", "ants", "--methods", "VPT", code=1)
    assert "has no task 'ant'" in reproduce("table1", "--tasks", "ant", code=1)
    said = reproduce("fig6", code=1)
    assert "none of the tasks cifar, svhn" in said
    assert "it has owls, cats, bees, ants: name them (--tasks" in said or "it has ants, bees" in said
    assert "--seeds must be whole numbers" in reproduce("table1", "--seeds", "1,a", code=1)


def test_sources_do_not_choose_the_targets(reproduce, root):
    said = json.loads(reproduce("table1", "--methods", "VPT", "--sources", "ants,bees,cats", "--dry-run", "--json"))
    assert {key for key in (*said["done"], *said["to_do"]) if key.startswith("VPT")} == {
        f"VPT.{name}" for name in ("ants", "bees", "cats", "owls")
    }


def test_a_pool_brings_the_sources_of_fig5(reproduce, out, tmp_path):
    plan = ("--pool", out / "pool.safetensors", "--out", tmp_path, "--dry-run", "--json")
    assert "embedding.owls" in json.loads(reproduce("fig5", "--tasks", "owls", *plan))["to_do"]


def test_a_pool_says_how_many_tokens(root, tmp_path, monkeypatch, capsys):
    _, pool = _given(["ants", "bees"])
    pool.save(tmp_path / "pool.safetensors")
    command = ["hgprompt", "reproduce", "fig3", "--data-root", root, "--tasks", "owls", "--out", tmp_path / "out"]
    command += ["--pool", tmp_path / "pool.safetensors", "--device", "cpu", "--dry-run", "--json"]
    monkeypatch.setattr("sys.argv", [str(a) for a in command])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["to_do"] == ["cosines.owls"]


def test_tasks_of_like_names_have_cells_of_their_own():
    assert method_key(COMPARED["Linear"], "red fox") != method_key(COMPARED["Linear"], "red-fox")


def test_the_start_of_the_sources_is_none_of_the_runs():
    with pytest.raises(OptionError, match="seed 0"):
        Plan(seeds=(0, 1))
    with pytest.raises(OptionError, match="seeds must be from 0"):
        Plan(seeds=(-1,))


def _given(tasks, **records):
    vit = load_backbone("mini", img_size=16, device="cpu")
    names = [f"p{i}" for i in range(len(tasks))]
    metadata = {name: {"task": task} | records for name, task in zip(names, tasks, strict=True)}
    return vit, PromptPool({name: random_prompt(vit, 2, seed=5) for name in names}, backbone=vit, metadata=metadata)


@pytest.mark.parametrize("task", ["pets", "Pets", "oxford_iiit_pet", "ants"])
def test_a_targets_own_prompt_is_left_out_by_any_of_its_names(tmp_path, task):
    for folder in ("pets", "ants"):
        write_task(tmp_path / folder, sizes=(12, 6, 6))
    vit, pool = _given([task, "bees", "cats"])
    lab = Lab(vit, None, find_suite(tmp_path), Plan(tokens=2), tmp_path, pool=pool)
    target = "ants" if task == "ants" else "pets"
    assert lab.sources(without=target) == ("p1", "p2")
    assert len(lab.sources(without="owls")) == 3


def test_a_given_pool_that_began_where_a_run_does_is_refused(tmp_path):
    write_task(tmp_path / "ants", sizes=(12, 6, 6))
    vit, pool = _given(["bees", "cats"], init_seed=42)
    with pytest.raises(OptionError, match="seed 42 is that of the sources"):
        Lab(vit, None, find_suite(tmp_path), Plan(tokens=2), tmp_path, pool=pool)


def test_a_share_that_is_not_the_last_says_what_is_left(reproduce, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, pool = _given(["bees", "cats"])
    pool.save(tmp_path / "pool.safetensors")
    given = ("--pool", tmp_path / "pool.safetensors", "--out", tmp_path / "out", "--json")
    said = json.loads(reproduce("fig3", "--tasks", "ants,owls", *given))
    assert len(said["done"]) == len(said["to_do"]) == 1
    assert said["experiment"] == "fig3"


def test_methods_without_a_pool_tune_no_sources(reproduce, tmp_path):
    options = ("table1", "--tasks", "ants", "--out", tmp_path / "out", "--seeds", "1")
    said = json.loads(reproduce(*options, "--methods", "Linear,PARTIAL-2", "--dry-run", "--json"))
    assert said["to_do"] == ["Linear.ants", "PARTIAL-2.ants"]
    refused = reproduce(*options, "--methods", "PARTIAL-99", "--dry-run", code=1)
    assert "PARTIAL-99: mini has 8 blocks" in " ".join(refused.split())
    said = reproduce(*options, "--methods", "Linear")
    assert "sources" not in said
    assert "Bold" not in said  # of one row
    assert "1 epoch on targets" in said
    assert "seed 1;" in said


def test_methods_by_name():
    assert method_of("MLP-4").name == "MLP-4"
    assert method_of("PARTIAL-3").k == 3
    assert method_of("HGPrompt, paper λ=0.5").lam == 0.5
    for wrong in ("MLP-", "MLP-x", "MLP-²", "MLP-1", "Linear-2", "PARTIAL-0"):
        with pytest.raises(OptionError):
            method_of(wrong)


def test_names_of_methods_may_have_commas():
    for names in (tuple(COMPARED), ("random, equal compute", "HGPrompt, raw H λ=2", "VPT", "HGPrompt", "SPoT")):
        assert method_names(",".join(names)) == names
    assert method_names(" uniform ,, VPT,") == ("uniform", "VPT")


def test_lambda_figure(tmp_path):
    curves = {"A": {0.1: [0.2, 0.3], 1.0: [0.4, 0.5], 10.0: [0.3, 0.3]}, "B": {0.1: [0.6], 10.0: [0.5]}}
    figures.plot_lambda(curves, tmp_path / "f.png")
    assert _is_picture(tmp_path / "f.png")


def test_figures_of_thirteen_tasks(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"a long name {i}" for i in range(13)]
    weights = rng.dirichlet(np.ones(13), 13)
    figures.plot_weights(dict.fromkeys(("one", "two", "three"), weights), names, names, tmp_path / "w.png")
    figures.plot_matrix(np.corrcoef(rng.standard_normal((13, 5))), names, "cosines", tmp_path / "m.png")
    points = {f"source {n}": rng.standard_normal((50, 2)) for n in names[:3]}
    figures.plot_embeddings(
        points, rng.integers(0, 12, 50), [str(i) for i in range(12)], {}, "owls", tmp_path / "e.png"
    )
    rows = {n: [(50.0, 1.0), (90.0, 0.0), (20.0, 0.0)] for n in names}
    figures.plot_scores(["x", "y", "z"], rows, "many rows", tmp_path / "s.png")
    figures.plot_dots(["x", "y", "z"], dict(list(rows.items())[:4]), "few", tmp_path / "d.png")
    assert all(_is_picture(tmp_path / f"{n}.png") for n in "wmesd")


def test_neighbours_by_hand():
    # On a line: of 0, 1, 2 and 10 the nearest other point is 1, 0, 1, 2; labels 0, 0, 1, 1 then agree in three cases.
    features, labels = torch.tensor([[0.0], [1.0], [2.1], [10.0]]).double(), torch.tensor([0, 0, 1, 1])
    assert neighbour_accuracy(features, labels, 1) == pytest.approx(3 / 4)
