"""hgprompt ensemble and inspect as a stranger meets them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hgprompt import EnsembleResult, FrozenViT, PromptPool

OPTIONS = {"img_size": 32, "depth": 12}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pool, weights and a small task."""
    root = tmp_path_factory.mktemp("cli")
    model = literal.named_vit("vit_tiny_patch16_224", img_size=32)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, root / "weights.safetensors")
    g = torch.Generator().manual_seed(0)
    prompts = {name: torch.randn(4, 192, generator=g) for name in ("cats", "dogs", "birds")}
    pool = PromptPool(prompts, backbone=FrozenViT.from_timm(model).info, metadata={"cats": {"task": "[red]cats"}})
    PromptPool(prompts).save(root / "nameless.safetensors")
    pool.save(root / "pool.safetensors")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (root / "task" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 120, (20, 30, 3), dtype=np.uint8)
            pixels[..., label] += 80
            Image.fromarray(pixels).save(root / "task" / name / f"{i}.png")
    return root


def _environment():
    # The tests may run from a checkout that is not installed.
    return os.environ | {"COLUMNS": "120", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


ENSEMBLE = ("ensemble", "pool.safetensors", "task", "--weights", "weights.safetensors", "--device", "cpu")


def test_checkpoints_are_gone_when_there_is_a_result(place, here):
    done = here(place, *ENSEMBLE, "-o", "kept-out", "--checkpoint-dir", "kept", "--no-plot")
    assert done.code == 0, done.err
    assert (place / "kept").is_dir()
    assert os.listdir(place / "kept") == []
    (place / "kept" / "pass.safetensors").write_bytes(b"not a checkpoint")
    refused = here(place, *ENSEMBLE, "-o", "kept-out", "--checkpoint-dir", "kept", "--no-plot")
    assert refused.code != 0
    assert "kept/pass.safetensors" in refused.err
    assert "Traceback" not in refused.err


def test_ensemble_and_inspect(place, here):
    done = here(place, *ENSEMBLE, "-o", "out", "--exclude", "birds")
    assert done.code == 0, done.err
    assert "wrote out/ensemble.safetensors" in done.out
    assert "24 images of 3 classes" in done.out
    assert "birds" not in done.out
    assert sorted(os.listdir(place / "out")) == ["ensemble.png", "ensemble.safetensors", "report.json"]
    again = here(place, "inspect", "out")
    assert again.code == 0
    assert "cats" in again.out
    shown = here(place, "inspect", "pool.safetensors")
    assert "3 shallow prompts of 4 tokens, 192 wide" in shown.out
    assert "[red]cats" in shown.out  # shown, not interpreted


def test_the_pass_takes_the_dtype_that_suits_the_hardware(place, here, monkeypatch):
    for suitable in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("hgprompt.bundled.fast_dtype", lambda _, dtype=suitable: dtype)
        for options, expected in (((), suitable), (("--dtype", "float32"), torch.float32)):
            done = here(place, *ENSEMBLE, "-o", "suited", "--no-plot", "--limit", "6", *options)
            assert done.code == 0, done.err
            report = json.loads((place / "suited" / "report.json").read_text())
            assert report["settings"]["dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.filterwarnings("default::hgprompt.errors.HGPromptWarning")  # of the image that is skipped
def test_the_commands_that_it_ends_with_can_be_run_as_they_are(place, here):
    import shutil

    shutil.copytree(place / "task", place / "damaged")
    (place / "damaged" / "red" / "3.png").write_bytes(b"no image")
    options = ("--bad-images", "skip", "--limit", "24", "--follow-links")
    done = here(place, "ensemble", "pool.safetensors", "damaged", *ENSEMBLE[3:], "-o", "of damaged", *options)
    assert done.code == 0, done.err
    commands = [shlex.split(line) for line in done.out.splitlines() if line.startswith("  hgprompt tune ")]
    best = EnsembleResult.load(place / "of damaged").best_single
    assert [command[command.index("--start") + 1] for command in commands] == ["of damaged", f"pool.safetensors:{best}"]
    for command, folder in zip(commands, ("tuned", "tuned-best-single"), strict=True):
        assert all(part in command for part in ("--weights", *options))
        tuned = here(place, *command[1:], "--epochs", "1")
        assert tuned.code == 0, tuned.err
        assert (place / "of damaged" / folder / "tuned.safetensors").exists()
    assert "--head" not in commands[0]
    assert commands[1][commands[1].index("--head") + 1] == "fitted"


def test_json_is_all_there_is_on_stdout(place, here):
    command = [sys.executable, "-m", "hgprompt.cli", *ENSEMBLE, "-o", "out2", "--json", "--limit", "12", "--no-plot"]
    # In a process of its own: whatever a library writes to the descriptor is seen.
    done = subprocess.run(command, cwd=place, env=_environment(), capture_output=True, text=True, timeout=120)
    record = json.loads(done.stdout)
    assert sum(record["weights"].values()) == pytest.approx(1)
    assert record["n_images"] == 12
    assert not (place / "out2" / "ensemble.png").exists()
    assert json.loads(here(place, "inspect", "pool.safetensors", "--json").out)["backbone"]["width"] == 192


@pytest.mark.filterwarnings("default::hgprompt.errors.HGPromptWarning")  # it is what a user sees
def test_bad_images_stop_or_are_skipped_and_named(place, here):
    import shutil

    shutil.copytree(place / "task", place / "torn")
    (place / "torn" / "red" / "3.png").write_bytes((place / "torn" / "red" / "3.png").read_bytes()[:60])
    command = ("ensemble", "pool.safetensors", "torn", *ENSEMBLE[3:], "-o", "torn_out", "--no-plot")
    stopped = here(place, *command)
    assert stopped.code == 1
    assert "3.png is no readable image" in stopped.err
    done = here(place, *command, "--bad-images", "skip", "--json")
    assert done.code == 0, done.err
    assert "warning: skipped 1 of 24 images: " in done.err
    record = json.loads(done.out)
    assert record["n_images"] == 23
    (skipped,) = record["skipped_images"]
    assert (skipped["count"], skipped["total"]) == (1, 24)
    report = json.loads((place / "torn_out" / "report.json").read_text())
    assert report["settings"]["skipped_images"] == [skipped]
    assert here(place, *command, "--bad-images", "ignore").code == 2


def test_links_out_of_a_folder_are_followed_where_that_is_asked_for(place, here):
    (place / "linked").mkdir()
    for kind in ("red", "green"):
        (place / "linked" / kind).symlink_to(place / "task" / kind, target_is_directory=True)
    command = ("ensemble", "pool.safetensors", "linked", *ENSEMBLE[3:], "-o", "linked_out", "--no-plot")
    refused = here(place, *command)
    assert refused.code == 1
    assert "--follow-links" in refused.err
    done = here(place, *command, "--follow-links", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["n_images"] == len(list((place / "linked").glob("*/*.png")))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("ensemble", "pool.safetensors", "nowhere", "--weights", "weights.safetensors"), 1, "no folder of images"),
        (("ensemble", "nowhere", "task"), 1, "does not exist"),
        (("ensemble", "weights.safetensors", "task"), 1, "no prompt pool"),
        (("ensemble", "nameless.safetensors", "task"), 1, "give --backbone"),
        ((*ENSEMBLE, "--exclude", "cat"), 1, "did you mean 'cats'"),
        ((*ENSEMBLE, "-o", "weights.safetensors"), 1, "cannot make the directory"),
        ((*ENSEMBLE, "--shrinkage", "2"), 1, "shrinkage"),
        ((*ENSEMBLE, "--dtype", "int3"), 2, "'float32', 'bfloat16'"),
        ((*ENSEMBLE, "--mean", "0.5"), 1, "mean must be 3 finite numbers"),
        ((*ENSEMBLE, "--backbone", "vit_small_patch16_224"), 1, "does not fit"),
        ((*ENSEMBLE, "--lambda", "-1"), 2, "lambda"),
        (("ensemble",), 2, "Missing argument"),
        (("inspect", "task"), 1, "neither an ensemble nor a tuned prompt"),
        (("dance",), 2, "No such command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_one_line_with_an_exit_code(place, arguments, code, message, here):
    done = here(place, *arguments)
    assert done.code == code
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert done.out == ""


def test_help(here, tmp_path):
    done = here(tmp_path, "ensemble", "--help")
    assert done.code == 0
    assert "--lambda" in done.out


def test_ctrl_c_leaves_nothing_behind(place):
    command = [sys.executable, "-m", "hgprompt.cli", *ENSEMBLE, "-o", "interrupted", "--batch-size", "1"]
    process = subprocess.Popen(
        command,
        cwd=place,
        env=_environment(),
        stderr=subprocess.PIPE,
        # Tests started in a shell's background ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (place / "interrupted").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1].decode()
    # A shell sees 130 in both cases: where the signal comes during an import that runs exec() (a dataclass), CPython
    # ends itself by the signal in the end, whatever the program's exit code is.
    assert process.returncode in (130, -signal.SIGINT), error
    assert "nothing half-written" in error
    assert not (place / "interrupted").exists()


def test_processes_of_torchrun_share_the_images(place, here):
    assert here(place, *ENSEMBLE, "--out", "one", "--batch-size", 5, "--no-plot").code == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "hgprompt.cli", *ENSEMBLE, "--out", "two", "--batch-size", "5", "--json"]
    run = subprocess.run(command, cwd=place, env=_environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["n_images"] == 24  # one JSON object: the first process alone prints
    one, two = (EnsembleResult.load(place / folder) for folder in ("one", "two"))
    # Every second image each: folds and gradient sample are those of one process; features are float32.
    torch.testing.assert_close(two.weights, one.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(two.weight_std, one.weight_std, rtol=1e-3, atol=1e-6)
