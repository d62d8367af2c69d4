"""A pass that was interrupted goes on to the bits of the undisturbed one, or says why it cannot."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import literal
import passes
import pytest
import ranks
import torch
import torch.distributed as dist
from passes import BATCH, FILE, C, N

import hgprompt.checkpoint
import hgprompt.ensemble
import hgprompt.one_pass
from hgprompt.backbone import FrozenViT
from hgprompt.checkpoint import SHARE, PassCheckpoint, _some_pixels
from hgprompt.errors import DataError, HGPromptWarning, OptionError, OutputError
from hgprompt.files import _temporary, read_safetensors
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import StopRule

OPTIONS = {
    "features": {"keep": "features"},
    "moments": {"keep": "moments"},
    "features, then moments": {"folds": 1},
    "a small sample": {"gradient_images": 10},
    "all images": {"gradient_images": None},
    "no gradients": {"gradient_images": 0, "lam": 0.0},
    "own head": {"head": passes.head()},
    "own function": {"head": lambda features: features[:, :C]},
    "tolerance": {"tolerance": 1e-9, "seed": 3},
    "uint8": {},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_resumed_pass_has_the_bits_of_the_undisturbed_one(kind, tmp_path):
    options, batches = OPTIONS[kind], passes.batches()
    if kind == "uint8":
        batches = [((50 * x).clamp(0, 255).byte(), y) for x, y in batches]
    sized = kind != "features, then moments"  # with a length, the smaller one is taken from the start
    expected = passes.run(batches if sized else iter(batches), **options)
    for number in (1, 5, 9):
        loader = passes.Until(number, own=batches)
        with pytest.raises(DataError, match="call again with the same data"):
            passes.run(loader if sized else iter(loader), tmp_path, **options)
        assert os.listdir(tmp_path) == [FILE]
    passes.assert_same_bits(passes.run(batches if sized else iter(batches), tmp_path, **options), expected)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["features", "moments", "own head"])
def test_empty_batches_are_passed_over(kind, tmp_path):
    """As a collate function makes them that drops bad images, all of a batch's."""
    batches = passes.batches()
    empty = (batches[0][0][:0], batches[0][1][:0])
    holes = [empty, batches[0], empty, *batches[1:], empty]
    expected = passes.run(batches, **OPTIONS[kind])
    with pytest.raises(DataError, match="call again with the same data"):
        passes.run(passes.Until(5, own=holes), tmp_path, **OPTIONS[kind])
    passes.assert_same_bits(passes.run(holes, tmp_path, **OPTIONS[kind]), expected)


def test_looks_that_know_nothing_can_be_gone_on_from(tmp_path, monkeypatch):
    """With one image of a class, the fold that holds it leaves no weights behind."""
    monkeypatch.setattr("hgprompt.stopping.FIRST", 12)
    images, labels = passes.data()
    labels = (torch.arange(len(labels)) == 3).long()
    batches, options = passes.batches(images=images, labels=labels), {"tolerance": 1e-9, "folds": 2}
    with pytest.raises(DataError, match="call again with the same data"):
        passes.run(passes.Until(5, own=batches), tmp_path, **options)
    passes.assert_same_bits(passes.run(batches, tmp_path, **options), passes.run(batches, **options))


def test_looks_after_a_resume_are_those_of_the_undisturbed_pass(tmp_path, monkeypatch):
    """Gradients of a closed-form head are taken for the first look and stay until a stop: also when a pass has been
    broken off after that look, and its sample has grown since."""
    monkeypatch.setattr("hgprompt.stopping.FIRST", 12)
    looks, look = [], StopRule.look

    def noted(self, weights, without_fold):
        looks.append((self.num_images, weights.tolist(), without_fold.tolist()))
        return look(self, weights, without_fold)

    monkeypatch.setattr(StopRule, "look", noted)
    options = {"tolerance": 1e-9, "seed": 3, "lam": 100.0}
    expected = passes.run(passes.batches(), **options)
    undisturbed, looks[:] = list(looks), []
    passes.interrupt(tmp_path, 6, **options)
    assert 2 <= len(looks) <= len(undisturbed) - 2
    passes.assert_same_bits(passes.run(passes.batches(), tmp_path, **options), expected)
    assert looks == undisturbed


def test_the_representation_changes_where_it_is_said_to(monkeypatch):
    """The case above that is to change from features to moments does so, after the last interruption."""
    seen = []
    update = EnsembleStatistics.update

    def watched(self, features, labels):
        update(self, features, labels)
        seen.append(self.keeps)

    monkeypatch.setattr(EnsembleStatistics, "update", watched)
    passes.run(iter(passes.batches()), **OPTIONS["features, then moments"])
    assert seen[8] == "features"
    assert seen[-1] == "moments"


def test_killed_at_fifty_random_moments(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    kills = {"features": 20, "moments": 16, "own head": 7, "tolerance": 7}
    command = [sys.executable, str(here / "programs" / "killed_passes.py"), str(tmp_path)]
    done = subprocess.run(
        [*command, *(f"{kind}={n}" for kind, n in kills.items())], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {kind: counts["kills"] for kind, counts in found.items()} == kills
    # A checkpoint after every batch: were none there to resume from, the comparison would have said nothing.
    assert sum(counts["with a checkpoint"] for counts in found.values()) >= 25


def test_what_is_done_is_not_computed_again(tmp_path, monkeypatch):
    calls = []
    encode = hgprompt.one_pass.encode
    monkeypatch.setattr(
        hgprompt.one_pass, "encode", lambda vit, prompts, images, **o: calls.append(images.shape[0])
        or encode(vit, prompts, images, **o),
    )  # fmt: skip
    passes.interrupt(tmp_path, 7)
    calls.clear()
    passes.run(passes.batches(), tmp_path)
    assert calls[:-1] == [BATCH] * (N // BATCH - 7)  # and one call more, for the mixed prompt at the end


@pytest.mark.parametrize("where", ["loader", "network"])
def test_ctrl_c_keeps_what_is_done(where, tmp_path, monkeypatch):
    loader = passes.Until(5, KeyboardInterrupt()) if where == "loader" else passes.batches()
    if where == "network":
        encode, left = hgprompt.one_pass.encode, iter([False] * 5 + [True])

        def interrupted(*arguments, **options):
            if next(left):
                raise KeyboardInterrupt
            return encode(*arguments, **options)

        monkeypatch.setattr(hgprompt.one_pass, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        passes.run(loader, tmp_path, checkpoint_every=1e6)
    monkeypatch.undo()
    assert len(read_safetensors(tmp_path / FILE)[0]["batches"]) == 5
    passes.assert_same_bits(passes.run(passes.batches(), tmp_path), passes.run(passes.batches()))


def test_a_batch_that_is_half_done_is_not_kept(tmp_path, monkeypatch):
    """Interrupted between the statistics and the sample, memory holds two different numbers of images."""
    update, left = ImageSample.update, iter([False] * 5 + [True])

    def interrupted(self, *arguments):
        if next(left):
            raise KeyboardInterrupt
        update(self, *arguments)

    monkeypatch.setattr(ImageSample, "update", interrupted)
    monkeypatch.setattr(hgprompt.checkpoint, "SHARE", 1e9)  # after every batch
    with pytest.raises(KeyboardInterrupt):
        passes.run(passes.batches(), tmp_path)
    monkeypatch.undo()
    assert len(read_safetensors(tmp_path / FILE)[0]["batches"]) == 5
    passes.assert_same_bits(passes.run(passes.batches(), tmp_path), passes.run(passes.batches()))


def test_features_that_are_found_late_not_to_be_finite_replace_no_checkpoint(tmp_path, monkeypatch):
    """On a GPU the check answers two batches later; here an event that has happened stands for the GPU's."""

    def late(self, features, position):
        self._pending.append((Mock(), features.flatten(1).isfinite().all(1), position))
        self._finish(2)

    passes.interrupt(tmp_path, 3)
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr("hgprompt.batch_checks.FiniteCheck.check", late)
    encode, calls = hgprompt.one_pass.encode, itertools.cycle(range(3))

    def broken(*arguments, **options):
        return encode(*arguments, **options) / float(next(calls) != 2)  # of batch 5

    monkeypatch.setattr(hgprompt.one_pass, "encode", broken)
    with pytest.raises(DataError, match="the disk is gone"):  # before anyone has asked whether they are finite
        passes.run(passes.Until(6), tmp_path, checkpoint_every=1e6)
    with pytest.raises(DataError, match=f"batch after image {5 * BATCH}"):
        passes.run(passes.batches(), tmp_path, checkpoint_every=1e6)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_failure_in_the_solve_does_not_cost_the_pass(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hgprompt.ensemble, "WeightProblem", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        passes.run(passes.batches(), tmp_path, checkpoint_every=1e6)
    monkeypatch.undo()
    # What only the solve needs may be another then.
    passes.assert_same_bits(passes.run(passes.batches(), tmp_path, lam=0.3), passes.run(passes.batches(), lam=0.3))


@pytest.mark.parametrize("at", ["gradients", "look"])
def test_ctrl_c_between_batches_leaves_a_file_to_go_on_from(at, tmp_path, monkeypatch):
    """In the last gradients that of the whole stream; in a look at the weights, the last one written before it."""
    options = {"tolerance": 1e-9, "lam": 100.0} if at == "look" else {}
    monkeypatch.setattr("hgprompt.stopping.FIRST", 30)
    expected = passes.run(passes.batches(), **options)
    if at == "look":
        monkeypatch.setattr(hgprompt.checkpoint, "SHARE", 1e9)  # after every batch

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hgprompt.one_pass, "pull_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            passes.run(passes.batches(), tmp_path, checkpoint_every=0.0 if at == "look" else 1e6, **options)
    # The first look is due with the fifth batch, whose checkpoint would follow it.
    assert len(read_safetensors(tmp_path / FILE)[0]["batches"]) == (4 if at == "look" else N // BATCH)
    passes.assert_same_bits(passes.run(passes.batches(), tmp_path, **options), expected)


OTHER_PASSES = {
    "prompts": {"prompts": passes.prompts(6)},
    "prompts ": {"prompts": dict(zip("xyz", passes.prompts(), strict=True))},
    "backbone": {"backbone": literal.tiny_vit(seed=1)},
    'dtype, "float32" and not "float64"': {"dtype": torch.float64},
    "folds, 3 and not 4": {"folds": 4},
    'keep, "auto" and not "moments"': {"keep": "moments"},
    "gradient_images, 256 and not 20": {"gradient_images": 20},
    "seed, 0 and not 1": {"seed": 1},
    'head, "shared-lda" and not "lda"': {"head": "lda"},
    "head": {"head": passes.head()},
    "tolerance, null and not 0.5": {"tolerance": 0.5},
    "micro_batch, null and not 2": {"micro_batch": 2},
    "normalisation": {"backbone": FrozenViT.from_timm(literal.tiny_vit()).set_preprocessing(mean=(0.1, 0.2, 0.3))},
}


def test_another_pass_is_refused_by_name(tmp_path):
    passes.interrupt(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    for difference, options in OTHER_PASSES.items():
        with pytest.raises(OptionError, match="another pass") as caught:
            passes.run(passes.batches(), tmp_path, **options)
        assert difference.strip() in str(caught.value)
    assert (tmp_path / FILE).read_bytes() == before


def test_another_head_of_the_same_kind_is_refused(tmp_path):
    passes.interrupt(tmp_path, head=passes.head(0))
    with pytest.raises(OptionError, match="head"):
        passes.run(passes.batches(), tmp_path, head=passes.head(1))


def test_other_data_or_another_order_is_refused(tmp_path):
    with pytest.raises(DataError):
        passes.run(iter(passes.Until(6)), tmp_path)  # of no length: it has to be seen in the stream
    before = (tmp_path / FILE).read_bytes()
    (images, labels), whole = passes.data(), passes.batches()
    order = torch.arange(N)
    other = next(i for i in range(19, 24) if labels[i] != labels[18])  # both in batch 3
    order[18], order[other] = other, 18
    relabelled = labels.clone()
    relabelled[33] = (relabelled[33] + 1) % C
    cases = {
        "batch 3 .* its labels are others": passes.batches(images=images[order], labels=labels[order]),
        "batch 5 .* its labels are others": passes.batches(images=images, labels=relabelled),
        "batch 2 .* its pixels are others": [*whole[:2], (whole[2][0].flip(3), whole[2][1])],
        "batch 0 .* its pixels are others": passes.batches(images=images.double(), labels=labels),
        "batch 0 .* 5 images and not 6: the batch size is another": passes.batches(5),
        "ended after 4 batches.* written after 6": whole[:4],
    }
    for message, loader in cases.items():
        with pytest.raises(DataError, match=message):
            passes.run(iter(loader), tmp_path)
    with pytest.raises(DataError, match=r"the disk is gone.*is as it was"):
        passes.run(iter(passes.Until(3)), tmp_path)
    with pytest.raises(OptionError, match="batches of the loader, null and not 18"):
        passes.run(passes.batches(5), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_another_number_of_ranks_is_refused(tmp_path):
    PassCheckpoint(tmp_path, {}, rank=1, num_ranks=2)
    passes.interrupt(tmp_path)
    for rank in range(2):
        with pytest.raises(OptionError, match=r"pass.safetensors, .* another number of ranks than 2"):
            PassCheckpoint(tmp_path, {}, rank=rank, num_ranks=2)
    (tmp_path / FILE).rename(tmp_path / "pass-rank-0001-of-0002.safetensors")
    with pytest.raises(OptionError, match="another number of ranks than 1"):
        passes.run(passes.batches(), tmp_path)


def _go_on(rank, folder):
    """Of a pass that each rank of two broke off elsewhere, and of the undisturbed one: the results, by folds."""
    own, found = passes.batches()[rank::2], {}
    for folds in (3, 8):
        options = {"process_group": dist.group.WORLD, "keep": "moments", "folds": folds}
        kept = f"{folder}/kept-{folds}"
        expected = passes.run(own, **options)
        with contextlib.suppress(DataError):  # before anything is reduced, so that no rank waits for another
            passes.run(passes.Until(2 + 3 * rank, own=own), kept, **options)
        result = passes.run(own, kept, **options)
        left = [name for name in os.listdir(kept) if f"-{rank:04d}-of-" in name]
        found[folds] = result, expected, left
    return found


def test_every_rank_goes_on_from_where_it_was(tmp_path):
    """Image n of rank r is number r + 2n of the whole, which deals it to another fold than one process alone would: of
    3 folds in another order, of 8 to every other one."""
    for found in ranks.run(_go_on, 2, tmp_path, tmp_path):
        for result, expected, left in found.values():
            passes.assert_same_bits(result, expected)
            assert left == []


def test_a_full_disk_costs_a_checkpoint_and_not_the_pass(tmp_path):
    passes.interrupt(tmp_path, 3)
    before = (tmp_path / FILE).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            passes.interrupt(tmp_path, 7)
            assert (tmp_path / FILE).read_bytes() == before
            assert os.listdir(tmp_path) == [FILE]
            result = passes.run(passes.batches(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    messages = [str(w.message) for w in warned if w.category is HGPromptWarning]
    assert [m.startswith("no checkpoint could be written, the pass goes on") for m in messages] == [True] * 2  # a pass
    passes.assert_same_bits(result, passes.run(passes.batches()))


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        passes.run(iter(()), tmp_path / "file")
    with pytest.raises(OptionError, match="checkpoint_every"):
        passes.run(iter(()), tmp_path / "folder", checkpoint_every=-1.0)


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / f"{_temporary(tmp_path / FILE)}abc123.tmp").write_bytes(b"half")
    (tmp_path / "of somebody else.tmp").write_bytes(b"whole")
    PassCheckpoint(tmp_path, {})
    assert os.listdir(tmp_path) == ["of somebody else.tmp"]


class _Anything:
    """The least that a checkpoint asks of a pass."""

    vit, prompts, statistics, sample = passes.VIT, passes.prompts(), EnsembleStatistics(), ImageSample(0, 1, seed=0)
    rule, gradients, num_gradient_images = None, None, 0


def _simulated(folder, monkeypatch, *, every, cost, assumed, batches):
    """When checkpoints are written, and when the pass ends, on a clock of our own: a batch takes a second, a checkpoint
    `cost` seconds, and before the first one is written it must be thought to take `assumed`."""
    now, times = [0.0], []

    def write(*_, **__):
        times.append(now[0])
        now[0] += cost

    monkeypatch.setattr(hgprompt.checkpoint, "write_safetensors", write)
    monkeypatch.setattr(hgprompt.checkpoint, "size_of", lambda _: 1 + int(200e6 * assumed))
    checkpoint = PassCheckpoint(folder, {}, every=every, clock=lambda: now[0])
    images, labels = passes.batches()[0]
    for _ in range(batches):
        now[0] += 1.0
        checkpoint.note(images, labels)
        checkpoint.done()
        if checkpoint.due(_Anything()):
            checkpoint.write(_Anything())
    checkpoint.end_of_stream(_Anything())
    return times, now[0]


@pytest.mark.parametrize(("every", "cost"), [(10.0, 0.1), (10.0, 2.0), (0.0, 1.0), (100.0, 0.0)])
def test_checkpoints_keep_their_distance(every, cost, tmp_path, monkeypatch):
    times, end = _simulated(tmp_path, monkeypatch, every=every, cost=cost, assumed=cost, batches=1000)
    *times, last = times
    gaps = [b - a for a, b in itertools.pairwise([-cost, *times])]
    wait, small = max(every, cost / SHARE), 1e-5  # sums of many seconds, rounded
    assert min(gaps) >= wait + cost - small
    assert max(gaps) <= wait + cost + 1.0 + small  # one batch later at most
    assert len(times) * cost <= SHARE * end + small
    assert last == pytest.approx(end - cost)  # whether it is time or not: what comes then may fail


def test_a_pass_too_short_to_pay_for_a_checkpoint_writes_one_at_its_end(tmp_path, monkeypatch):
    times, _ = _simulated(tmp_path, monkeypatch, every=0.0, cost=60.0, assumed=60.0, batches=1000)
    assert times == [1000.0]


def test_a_faster_disk_is_noticed(tmp_path, monkeypatch):
    """The first waits until 1 s would be paid for, the second for 0.1 s, which the first has taken."""
    times, _ = _simulated(tmp_path, monkeypatch, every=0.0, cost=0.1, assumed=1.0, batches=40)
    assert times[:2] == pytest.approx([1 / SHARE, 1 / SHARE + 0.1 + 0.1 / SHARE], abs=2.1)  # a batch each


@pytest.mark.parametrize("size", [32, 64, 96, 224, 256])
def test_pixels_of_every_row_column_and_channel_are_compared(size):
    places = _some_pixels(torch.arange(3 * size * size)[None])[0]
    assert len(places) <= 2048  # about 1024, whatever the size
    for seen, count in ((places % size, size), (places // size % size, size), (places // size**2, 3)):
        assert len(seen.unique()) == count
