"""The road of a user with folders of images: train-source, ensemble, tune, inspect; and all that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgprompt import EnsembleResult, PromptPool, fast_ensemble, load_backbone
from hgprompt.data import render_task
from hgprompt.tuning import TuneConfig, TuneResult, random_prompt, tune

FAST = (
    "--epochs", "2", "--batch-size", "8", "--dtype", "float32", "--device", "cpu", "--image-size", "32", "--quiet",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three folders of small images: two sources and a new task."""
    root = tmp_path_factory.mktemp("tuning")
    rng = np.random.default_rng(0)
    for task, classes in (
        ("fruit", ("apple", "pear")),
        ("birds", ("owl", "tit", "wren")),
        ("stones", ("flint", "jade")),
    ):
        for label, name in enumerate(classes):
            (root / task / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 120, (20, 30, 3), dtype=np.uint8)
                pixels[..., label] += 80
                Image.fromarray(pixels).save(root / task / name / f"{i}.png")
    return root


def _command(*arguments):
    return [sys.executable, "-m", "hgprompt.cli", *map(str, arguments)]


def _environment():
    # The tests may run from a checkout that is not installed.
    return os.environ | {"COLUMNS": "140", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def test_the_whole_road(place, here):
    trained = here(place, "train-source", "fruit", "birds", "--pool", "pool.safetensors", "--tokens", "4", *FAST)
    assert trained.code == 0, trained.err
    assert "2 shallow prompts of 4 tokens, 192 wide" in trained.out
    assert trained.out.splitlines()[-1] == "wrote pool.safetensors"
    pool = PromptPool.load(place / "pool.safetensors")
    assert pool.names == ("fruit", "birds")
    assert pool.backbone is not None
    assert pool.backbone.name == "mini"
    assert pool.metadata["birds"]["training"]["classes"] == 3
    assert not list(place.glob("*.checkpoint*"))

    mixed = here(place, "ensemble", "pool.safetensors", "stones", "-o", "mix", "--device", "cpu", "--quiet")
    assert mixed.code == 0, mixed.err

    tuned = here(place, "tune", "stones", "--start", "mix", "--test", "stones", "-o", "tuned", *FAST)
    assert tuned.code == 0, tuned.err
    assert "test accuracy" in tuned.out
    assert sorted(os.listdir(place / "tuned")) == ["history.json", "tuned.safetensors", "tuning.png"]
    result = TuneResult.load(place / "tuned")
    assert result.class_names == ("flint", "jade")
    assert result.prompts.shape == (1, 4, 192)
    assert "stones: tuned with mini" in here(place, "inspect", "tuned").out

    single = here(place, "tune", "stones", "--start", "pool.safetensors:birds", "-o", "single", "--json", *FAST)
    record = json.loads(single.out)
    assert record["last"]["epoch"] == 2

    # A second run of the same command has nothing to do; a third source is added to the pool.
    before = (place / "pool.safetensors").read_bytes()
    again = here(place, "train-source", "fruit", "birds", "--pool", "pool.safetensors", "--tokens", "4", *FAST)
    assert again.code == 0
    assert (place / "pool.safetensors").read_bytes() == before
    added = here(
        place, "train-source", "procedural:elevation", "--pool", "pool.safetensors", "--limit", "20", *FAST, "--json"
    )
    assert json.loads(added.out)["pool"] == ["fruit", "birds", "elevation"]
    other = here(place, "train-source", "fruit", "--pool", "pool.safetensors", "--lr", "1", *FAST)
    assert other.code == 1
    assert "already has a prompt named 'fruit'" in other.err
    for option, message in ((("--seed", "7"), "started from seed 0"), (("--tokens", "5"), "prompts of 4 tokens")):
        refused = here(place, "train-source", "stones", "--pool", "pool.safetensors", *option, *FAST)
        assert refused.code == 1
        assert message in refused.err
    # A tuned prompt is a start too, and its folder's file can be looked at.
    onward = here(place, "tune", "stones", "--start", "tuned", "-o", "onward", *FAST)
    assert onward.code == 0, onward.err
    assert here(place, "inspect", "onward/tuned.safetensors").code == 0


def test_the_head_learns_at_a_quarter_of_the_prompts_rate(place, here):
    assert here(place, "tune", "stones", "--lr", "0.2", "-o", "quarter", *FAST).code == 0
    assert TuneResult.load(place / "quarter").config.head_lr == pytest.approx(0.05)


def test_the_head_starts_fitted_on_request(place, here):
    still = ("--epochs", "1", "--lr", "0", "--head-lr", "0", "--device", "cpu", "--quiet")
    accuracies = {}
    for head in ("random", "fitted"):
        done = here(place, "tune", "stones", "--head", head, "-o", f"{head}-head", *still)
        assert done.code == 0, done.err
        accuracies[head] = TuneResult.load(place / f"{head}-head").history[-1]["train_accuracy"][0]
    # Nothing is learned: what is right is right from the start. A random head guesses one of two classes.
    assert accuracies["fitted"] > max(0.9, accuracies["random"])


def test_two_commands_add_to_one_pool(place):
    """At the same time: neither loses what the other has tuned."""
    processes = [
        subprocess.Popen(
            _command("train-source", source, "--pool", "shared.safetensors", "--tokens", "2", *FAST),
            cwd=place, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for source in ("fruit", "birds")
    ]  # fmt: skip
    for process in processes:
        assert process.wait(timeout=300) == 0, process.stderr.read()
    assert set(PromptPool.load(place / "shared.safetensors")) == {"fruit", "birds"}


def test_killed_in_the_middle_and_run_again(place, here):
    arguments = ("train-source", "birds", "--tokens", "2", "--epochs", "6", "--batch-size", "4", *FAST[4:])
    undisturbed = here(place, *arguments, "--pool", "whole.safetensors")
    assert undisturbed.code == 0, undisturbed.err
    process = subprocess.Popen(
        _command(*arguments, "--pool", "killed.safetensors"), cwd=place, env=_environment(), stderr=subprocess.DEVNULL
    )
    checkpoint = place / "killed.birds.checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert checkpoint.exists()
    assert not (place / "killed.safetensors").exists()
    resumed = here(place, *arguments, "--pool", "killed.safetensors")
    assert resumed.code == 0, resumed.err
    assert (place / "killed.safetensors").read_bytes() == (place / "whole.safetensors").read_bytes()
    assert not checkpoint.exists()


@pytest.fixture(scope="module")
def broken(place):
    """Folders that are not what they should be."""
    (place / "hollow" / "full").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "hollow" / "full" / "x.png")
    (place / "hollow" / "empty").mkdir()
    (place / "torn" / "a").mkdir(parents=True)
    (place / "torn" / "b").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "torn" / "a" / "x.png")
    (place / "torn" / "b" / "y.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (place / "huge" / "a").mkdir(parents=True)
    (place / "huge" / "b").mkdir(parents=True)
    Image.new("1", (30_000, 30_000)).save(place / "huge" / "a" / "x.png")
    Image.new("RGB", (8, 8)).save(place / "huge" / "b" / "x.png")
    (place / "split").mkdir()
    (place / "split" / "train800val200.txt").write_text("images/0.png 0\n")
    (place / "labels").mkdir()
    (place / "labels" / "classes.txt").write_text("one\ntwo\n")
    Image.new("RGB", (8, 8)).save(place / "labels" / "0.png")
    (place / "labels" / "train800val200.txt").write_text("0.png 0\n0.png 2\n")
    (place / "many").mkdir()
    (place / "many" / "train800val200.txt").write_text(f"x.png {10**23}\n")
    (place / "nul").mkdir()
    (place / "nul" / "train800val200.txt").write_text("a\0b.png 0\n")
    (place / "lonely" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(place / "lonely" / "a" / "x.png")
    (place / "file").write_text("no folder")
    return place


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train-source", "nowhere"), 1, "no folder of images"),
        (("train-source", "hollow"), 1, "holds no images"),
        (("train-source", "torn"), 1, "y.png is no readable image"),
        (("train-source", "huge"), 1, "x.png is too large"),
        (("train-source", "split"), 1, "line 1: split/images/0.png does not exist"),
        (("train-source", "labels"), 1, "line 2: label 2 is no class of 2"),
        (("train-source", "lonely"), 1, "at least 2 classes"),
        (("train-source", "many"), 1, "is no class of at most 100000"),
        (("train-source", "nul"), 1, "line 1: nul/a"),
        (("train-source", "fruit", "--name", "a\tb"), 1, "printable"),
        (("train-source", "procedural:azimuth", "--limit", "100000000000"), 1, "ask for fewer"),
        (("train-source", "fruit", "--image-size", "17"), 1, "multiples of the mini backbone's patches"),
        (("train-source", "fruit", "--lr", "3e38"), 1, "lr must be"),
        (("tune", "procedural:azimuth", "--limit", "18", "--test", "val"), 1, "(its split is 'test')"),
        (("tune", "fruit", "--start", "fruit"), 1, "neither an ensemble nor a tuned prompt"),
        (("tune", "fruit", "--head", "lda"), 2, "'random', 'fitted'"),
        (("tune", "nowhere", "--out", "not-made"), 1, "no folder of images"),
        (("inspect", "fruit"), 1, "neither an ensemble nor a tuned prompt"),
        (("train-source", "fruit", "--pool", "file/pool.safetensors"), 1, "cannot make the directory"),
        (("train-source", "fruit", "fruit"), 1, "several sources are named fruit"),
        (("train-source", "fruit", "birds", "--name", "x"), 1, "--name goes with one"),
        (("train-source", "fruit", "--backbone", "vit_minuscule"), 1, "timm knows no model"),
        (("train-source", "procedural:dance"), 1, "there are sprite-x-location"),
        (("train-source", "fruit", "--optimizer", "lion"), 2, "'sgd', 'adamw'"),
        (("train-source", "fruit", "--device", "abacus"), 1, "abacus"),
        (("train-source",), 2, "Missing argument"),
        (("tune", "fruit", "--start", "nothing"), 1, "there is no 'nothing'"),
        (("tune", "fruit", "--out", "file"), 1, "cannot make the directory"),
        (("demo", "--quick", "--full"), 1, "exclude each other"),
        (("demo", "--target", "dance"), 1, "no procedural task"),
        (("demo", "--out", "file"), 1, "cannot make the directory"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line_with_an_exit_code(broken, arguments, code, message, here):
    before = set(os.listdir(broken))
    done = here(broken, *arguments)
    assert "not-made" not in os.listdir(broken)
    assert done.code == code, done.err
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not [n for n in set(os.listdir(broken)) - before if n.endswith(".safetensors")]


@pytest.mark.parametrize("command", ["demo", "train-source", "ensemble", "tune", "inspect"])
def test_help_says_what_it_does(command, here, tmp_path):
    done = here(tmp_path, command, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert command in here(tmp_path, "--help").out


def test_a_test_folder_must_have_the_same_classes(place, here):
    for test, message in (("birds", "owl"), ("test", "neither a split")):
        done = here(place, "tune", "stones", "--test", test, "-o", "never", *FAST)
        assert done.code == 1
        assert message in done.err


def test_a_file_by_name_is_the_one_that_is_read(place, here, tmp_path):
    """A mixture and what was tuned from it, in one folder."""
    vit = load_backbone("mini", device="cpu")
    one, other = random_prompt(vit, 2, seed=1), random_prompt(vit, 2, seed=2)
    pool = PromptPool({"a": one, "b": other}, backbone=vit.info)
    images = render_task("object-count", 20, image_size=64)
    mixed = fast_ensemble(pool, images.batches(10), backbone=vit, lam=0, gradient_images=0)
    mixed.save(tmp_path / "both")
    still = TuneConfig(epochs=1, lr=0.0, head_lr=0.0)
    tune(vit, {"b": other}, images, config=still).save(tmp_path / "both")
    for file, expected in (("ensemble", mixed.prompt), ("tuned", other)):
        path = tmp_path / "both" / f"{file}.safetensors"
        done = here(
            place, "tune", "stones", "--start", path, "-o", tmp_path / file, "--lr", "0", "--head-lr", "0", *FAST
        )
        assert done.code == 0, done.err
        torch.testing.assert_close(TuneResult.load(tmp_path / file).prompts[0], expected)
    assert torch.equal(EnsembleResult.load(tmp_path / "both" / "ensemble.safetensors").prompt, mixed.prompt)
    for command in (("tune", "stones", "--start"), ("inspect",)):
        refused = here(place, *command, tmp_path / "both")
        assert refused.code == 1
        assert "an ensemble and a tuned prompt: name" in " ".join(refused.err.split())
    tune(vit, {"a": one, "b": other}, images, config=still).save(tmp_path / "several")
    refused = here(place, "tune", "stones", "--start", tmp_path / "several")
    assert "holds 2 tunings (a, b)" in " ".join(refused.err.split())
    assert "run 'a' of 2" in " ".join(here(place, "inspect", tmp_path / "several").out.split())
    pool.save(tmp_path / "pool.safetensors")
    refused = here(place, "tune", "stones", "--start", tmp_path / "pool.safetensors")
    assert "pool.safetensors:a" in refused.err.replace("\n", "")


def test_a_test_on_training_images_is_warned_of(place, here, tmp_path):
    done = here(place, "tune", "stones", "--test", "stones", "-o", tmp_path / "out", "--limit", "4", *FAST)
    assert done.code == 0, done.err
    assert "16 of 16 test images are among those of --split train800val200" in " ".join(done.err.split())
