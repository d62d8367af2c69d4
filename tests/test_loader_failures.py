"""Loaders whose worker processes die, hang or raise: what happened is said, and what was done is kept."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import time

import literal
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import hgprompt.checkpoint
from hgprompt import FrozenViT, fast_ensemble, select_prompts
from hgprompt.checkpoint import PassCheckpoint
from hgprompt.cli.options import batches
from hgprompt.data import ImageDataset, load_task, make_loader
from hgprompt.data.folders import ImageTask
from hgprompt.errors import DataError, OptionError
from hgprompt.files import read_safetensors
from hgprompt.workers import end_workers

N, BATCH, BAD = 48, 6, 4  # the batch in which it happens


class Images(Dataset):
    """Random images; at the first one of batch BAD the worker fails in its way."""

    def __init__(self, failure=None):
        g = torch.Generator().manual_seed(0)
        self.labels = torch.randint(0, 3, (N,), generator=g)
        self.images = torch.randn(N, 3, 16, 16, generator=g) + self.labels[:, None, None, None]
        self.failure = failure

    def __len__(self):
        return N

    def __getitem__(self, i):
        if i == BAD * BATCH and self.failure is not None:
            self.failure()
        return self.images[i], self.labels[i]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


def fail():
    raise ValueError("the archive has no such member")


def refuse():
    raise DataError("cat.jpg is no readable image")


def _run(failure, folder=None, timeout=0.0):
    g = torch.Generator().manual_seed(1)
    return fast_ensemble(
        torch.randn(3, 2, 16, generator=g), DataLoader(Images(failure), BATCH, num_workers=1, timeout=timeout),
        backbone=FrozenViT.from_timm(literal.tiny_vit()), folds=3, starts=1, max_steps=5,
        checkpoint_dir=folder, checkpoint_every=0.0,
    )  # fmt: skip


FAILURES = {
    "dies": (die, 0.0, r"a worker process has died .*fewer workers"),
    "hangs": (hang, 2.0, r"after 4 batches: no batch came .*timed out after 2.* longer timeout"),
    "raises": (fail, 0.0, r"after 4 batches: ValueError: the archive has no such member \(in a worker"),
    "refuses": (refuse, 0.0, r"^cat.jpg is no readable image"),
}


def _processes():
    """Children of this process that run."""
    return set(multiprocessing.active_children())


@pytest.mark.parametrize("kind", FAILURES)
def test_a_worker_that(kind, tmp_path, monkeypatch):
    failure, timeout, message = FAILURES[kind]
    if kind == "dies":  # the signal may come in the midst of a batch: the checkpoint before must be there
        monkeypatch.setattr(hgprompt.checkpoint, "SHARE", 1e9)
    # How long the end of a loader waits for a worker that hangs.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    before = _processes()
    with pytest.raises(DataError, match=message) as caught:
        _run(failure, tmp_path, timeout)
    # Although the error holds the frames that hold the loader: else PyTorch raises again with the next process's end.
    assert _processes() <= before
    for _ in range(3):
        subprocess.run(["true"], check=True)
    # A worker is at most two batches ahead; of one that dies, what it had sent may be lost with it.
    done = len(read_safetensors(tmp_path / "pass.safetensors")[0]["batches"])
    assert done == BAD or (kind == "dies" and done >= BAD - 3)
    assert "call again with the same data" in str(caught.value)
    resumed, undisturbed = _run(None, tmp_path), _run(None)
    assert torch.equal(resumed.weights, undisturbed.weights)
    assert resumed.h_score == undisturbed.h_score


@pytest.mark.parametrize("use", ["ensemble", "select"])
def test_an_error_between_two_batches_leaves_no_worker(use, tmp_path):
    """Of a loader whose iterator is a generator, which holds the workers itself. One is refused its images, of a wrong
    size, the other a budget that cannot be kept; both errors hold the frames that hold the loader."""
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    call, side, message = {
        "ensemble": (fast_ensemble, 8, "16"),
        "select": (functools.partial(select_prompts, size=1, budget=0.1), 16, "budget"),
    }[use]
    loader = make_loader(load_task(tmp_path), (side, side), batch_size=2, workers=1, bad_images="skip")
    before, vit = _processes(), FrozenViT.from_timm(literal.tiny_vit())
    with pytest.raises((DataError, OptionError), match=message) as caught:
        call(torch.zeros(2, 1, 16), loader, backbone=vit)
    assert _processes() <= before
    assert caught.value.__traceback__ is not None


def test_a_generator_of_the_callers_own_can_be_gone_on_with():
    own = (batch for batch in range(3))
    next(own)
    end_workers(own, iter(own))
    assert list(own) == [1, 2]


def test_a_death_that_is_noticed_within_the_network_is_named_as_well(tmp_path, monkeypatch):
    """PyTorch says it from a signal handler, which runs wherever the program is."""
    done = PassCheckpoint.done

    def signalled(self):
        done(self)
        if len(self._records) >= 6:
            raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    monkeypatch.setattr(PassCheckpoint, "done", signalled)
    with pytest.raises(DataError, match="a worker process has died") as caught:
        _run(None, tmp_path)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_so_is_one_while_prompts_are_selected(monkeypatch):
    def signalled(*_, **__):
        raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    monkeypatch.setattr("hgprompt.selection.encode", signalled)
    with pytest.raises(DataError, match=r"a worker process has died .*fewer workers") as caught:
        select_prompts(
            torch.randn(4, 2, 16), DataLoader(Images(), BATCH), size=2, backbone=FrozenViT.from_timm(literal.tiny_vit())
        )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_connection_that_is_lost_is_a_worker_or_the_loaders_own():
    """A worker may die while a tensor of its is on the way; without workers the loader means another connection."""

    class Lost:
        def __init__(self, num_workers):
            self.num_workers = num_workers

        def __iter__(self):
            raise ConnectionResetError("reset by peer")
            yield

    for workers, message in (
        (2, r"a worker process has died \(reset by peer\)"),
        (0, "ConnectionResetError: reset by"),
    ):
        with pytest.raises(DataError, match=message):
            fast_ensemble(torch.zeros(2, 1, 16), Lost(workers), backbone=FrozenViT.from_timm(literal.tiny_vit()))


def test_our_own_loader_has_a_timeout(tmp_path):
    task = ImageTask("task", ((tmp_path / "a.png", 0),), None)
    assert make_loader(task, (8, 8), workers=1).timeout == 300
    assert make_loader(task, (8, 8), workers=1, timeout=7).timeout == 7
    assert make_loader(task, (8, 8)).timeout == 0  # without workers there is nobody to wait for
    on_disk = ImageDataset(task.samples, (8, 8))
    for share in ((0, 1), (1, 2)):  # of the command line, alone and under torchrun
        assert batches(on_disk, 4, seed=0, share=share).timeout == 300


def test_a_loader_that_refuses_to_say_its_length():
    class Endless(list):
        def __len__(self):
            raise NotImplementedError("an IterableDataset has no length")

    batches = list(DataLoader(Images(), BATCH))
    prompts, model = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0)), literal.tiny_vit()
    expected = fast_ensemble(prompts, batches, backbone=model)
    assert torch.equal(fast_ensemble(prompts, Endless(batches), backbone=model).weights, expected.weights)
