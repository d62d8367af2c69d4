"""Work shared by ranks gives the answer of one process, and the same bits on every rank; what goes wrong is told."""

from __future__ import annotations

import copy
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import literal
import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hgprompt import DistributedError, EnsembleStatistics, HGPromptError, OptionError, fast_ensemble, select_prompts
from hgprompt.distributed import Ranks, slices
from hgprompt.moments import Moments
from hgprompt.sample import folds_of

WORLD = 4
COUNT = 41
UNEVEN = (slice(0, 22), slice(22, 22), slice(22, 23), slice(23, COUNT))  # one rank with nothing, one with one image


def _problem(dtype=torch.float32):
    """Images whose classes show, in a stream that is sorted for a part: ranks see different classes."""
    g = torch.Generator().manual_seed(5)
    labels = torch.cat([torch.arange(COUNT - 8) % 3, torch.full((8,), 7)])
    images = torch.randn(COUNT, 3, 16, 16, generator=g) + 0.1 * labels[:, None, None, None]
    prompts = 2 * torch.randn(3, 2, 16, generator=g)
    return literal.tiny_vit().to(dtype), prompts.to(dtype), images.to(dtype), labels


def _batches(images, labels, size=5):
    return list(zip(images.split(size), labels.split(size), strict=True)) if len(labels) else []


def _weights_and_bytes(result):
    """α, and every field of a result as bytes."""
    tensors, record = result.to_parts()
    return result.weights, {k: t.numpy().tobytes() for k, t in tensors.items()} | {
        k: repr(v) for k, v in record.items()
    }


# What goes on where several ranks are: the options of fast_ensemble, and whether the default deal of images is needed.
_SETTINGS = {
    "features": ({"keep": "features", "gradient_images": 16}, True),
    "moments": ({"keep": "moments", "gradient_images": 16}, True),
    "prompts": ({"shard": "prompts", "gradient_images": 16}, True),
    "uneven": ({"gradient_images": None, "folds": 1}, False),
    "uneven moments": ({"gradient_images": None, "folds": 1, "keep": "moments"}, False),
    "by H alone": ({"lam": 0.0}, False),
}


def _head(features):
    return features[:, :8]


def _all_settings(rank):
    model, prompts, images, labels = _problem()
    found = {}
    for world in range(1, WORLD + 1):
        group = dist.new_group(range(world))  # of which the last ranks are no members
        if rank >= world:
            continue
        for name, (options, strided) in _SETTINGS.items():
            share = slice(rank, None, world) if strided else UNEVEN[rank]
            if not strided and world < WORLD:
                continue
            if options.get("shard") == "prompts":
                share = slice(None)
            batches = _batches(images[share], labels[share])
            result = fast_ensemble(prompts, batches, backbone=model, process_group=group, **options)
            found[name, world] = _weights_and_bytes(result)
        options = {"head": _head, "folds": 1, "process_group": group}
        share = slice(rank, None, world)
        result = fast_ensemble(prompts, _batches(images[share], labels[share]), backbone=model, **options)
        found["own head", world] = _weights_and_bytes(result)
        result = fast_ensemble(prompts, _batches(images, labels), backbone=model, shard="prompts", **options)
        found["own head, prompts", world] = _weights_and_bytes(result)
    return found


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    return ranks.run(_all_settings, WORLD, tmp_path_factory.mktemp("ranks"))


def test_every_rank_ends_with_the_same_bits(by_rank):
    assert {world for _, world in by_rank[0]} == {1, 2, 3, 4}
    for (name, world), (_, first) in by_rank[0].items():
        for found in by_rank[1:world]:
            assert found[name, world][1] == first, (name, world)


def test_ranks_give_the_weights_of_one_process(by_rank):
    model, prompts, images, labels = _problem()
    own = {"own head": ({"head": _head, "folds": 1}, True), "own head, prompts": ({"head": _head, "folds": 1}, True)}
    for name, (options, _) in (_SETTINGS | own).items():
        alone = fast_ensemble(
            prompts, _batches(images, labels), backbone=model, **{k: v for k, v in options.items() if k != "shard"}
        )
        assert float(alone.weights.max()) < 0.99, "at a vertex of the simplex nothing is compared"
        compared = 0
        for (theirs, _), (weights, _) in by_rank[0].items():
            if theirs == name:
                # Features are float32; the solve is float64, to a gap that leaves α alone to this.
                torch.testing.assert_close(weights, alone.weights, rtol=0, atol=1e-6)
                compared += 1
        assert compared >= 1


def _long_stream():
    """A shuffled stream that is long enough to stop early, with prompts that differ plainly."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (640,), generator=g)
    images = torch.randn(640, 3, 16, 16, generator=g) + labels[:, None, None, None]
    return literal.tiny_vit(), torch.randn(4, 2, 16, generator=g), images, labels


def _stops_early(rank):
    model, prompts, images, labels = _long_stream()
    # One start of the solver: what is compared is when the ranks stop, on weights inside the simplex.
    options = {"backbone": model, "tolerance": 2.0, "process_group": dist.group.WORLD, "folds": 4, "starts": 1}
    mine = slice(rank, None, WORLD)
    result = fast_ensemble(prompts, _batches(images[mine], labels[mine]), **options)
    by_prompts = fast_ensemble(prompts, _batches(images, labels, 20), shard="prompts", **options)
    # Rank 2 has no more after its first batch: the others go on looking, together.
    mine = slice(2, 22, WORLD) if rank == 2 else mine
    uneven = fast_ensemble(prompts, _batches(images[mine], labels[mine]), **options)
    mine = slice(rank, 160, WORLD)  # as many as two looks need
    by_h = fast_ensemble(prompts, _batches(images[mine], labels[mine]), lam=0.0, gradient_images=32, **options)
    return (
        [_weights_and_bytes(r) for r in (result, by_prompts, uneven)],
        [r.n_images for r in (result, uneven)],
        (by_h.n_images, by_h.sample_h_score, by_h.sample_h_score_mixed_prompt),
    )


def _selects(rank):
    model, prompts, images, labels = _long_stream()
    prompts = torch.cat([prompts, -prompts, prompts.flip(1).roll(1, 2)])
    found = []
    for method in ("halving", "greedy", "ranking"):
        group = {} if rank is None else {"process_group": dist.group.WORLD}
        batches = _batches(images[:80], labels[:80], 16)
        selection = select_prompts(prompts, batches, size=3, backbone=model, method=method, **group)
        assert list(selection.pool) == list(selection.names)
        found.append((selection.indices, selection.weights, selection.rounds, selection.pairs, selection.h_score))
    return found


def _told(function):
    """The error that a call ends with."""
    try:
        function()
    except (HGPromptError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return None


def _failing(batches):
    yield batches[0]
    raise OSError("the disk is gone")


def _failing_report(stage, done, total):
    if done:
        raise RuntimeError("the screen is gone")


def _failing_head(features):
    raise RuntimeError("the head is off")


def _goes_wrong(rank):
    """What every rank is told, by what went wrong. The group stays usable: every case uses it again."""
    model, prompts, images, labels = _problem()
    batches = _batches(images, labels)

    def call(loader=batches, prompts=prompts, **options):
        return _told(lambda: fast_ensemble(prompts, loader, backbone=model, process_group=dist.group.WORLD, **options))

    at = {"shard": "prompts"}
    bad = rank == 2
    return {
        "lam": call(lam=0.5 if bad else 1.0),
        "prompts": call(prompts=-prompts if bad else prompts),
        "backbone": _told(
            lambda: fast_ensemble(
                prompts, batches, backbone=literal.tiny_vit(seed=int(bad)), process_group=dist.group.WORLD
            )
        ),
        "option": call(folds=-1 if bad else 8),
        "checkpoint": call(checkpoint_dir=tempfile.mkdtemp() if bad else None),
        "loader": call(_failing(batches) if bad else batches),
        "loader, prompts": call(_failing(batches) if bad else batches, **at),
        "loader, looking": call(_failing(batches) if bad else batches, tolerance=0.1),
        "head, prompts": call(head=_failing_head if bad else _head, **at),
        "head, looking": call(head=_failing_head if bad else _head, tolerance=0.1, **at),
        "report, prompts": call(progress=_failing_report if bad else False, **at),
        "batches differ": call(batches[::-1] if bad else batches, **at),
        "fewer batches": call(batches[:-1] if bad else batches, **at),
        "no images": call([]),
        "one class": call([(images[:5], torch.zeros(5, dtype=torch.int64))]),
        "solve": call([(images * 0, labels)], gradient_images=0, lam=0.0),
    }


def _many_things(rank):
    """All in one set of processes, which take longer to start than to work."""
    return (
        _stops_early(rank),
        _selects(rank),
        _goes_wrong(rank),
        _merges(rank),
        *(_trains(rank, wrap, with_hgprompt) for wrap in ("DDP", "FSDP") for with_hgprompt in (True, False)),
    )


def _trains(rank, wrap, with_hgprompt):
    """A rank's parameters after a few steps, with or without calls between them, on a group of two of the ranks."""
    model, prompts, images, labels = _problem()
    pairs = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    group = pairs[0] if rank in (0, 3) else pairs[1]
    torch.manual_seed(7 + rank)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(), torch.nn.Linear(8, 3))
    if wrap == "DDP":
        wrapped = torch.nn.parallel.DistributedDataParallel(net)
    else:  # in place: every rank keeps a part of each parameter
        wrapped = fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    found = []
    for _ in range(3):
        with torch.autocast("cpu"):
            loss = wrapped(torch.randn(4, 6)).square().mean()
            if with_hgprompt:
                states = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_rng_state(), net.training
                mine = slice(dist.get_rank(group), None, 2)
                found.append(
                    fast_ensemble(
                        prompts, _batches(images[mine], labels[mine]), backbone=model, process_group=group
                    ).weights
                )
                now = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_rng_state(), net.training
                assert states[:2] == now[:2]
                assert torch.equal(states[2], now[2])
                assert states[3] == now[3]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():  # a caller of another kind
        if with_hgprompt:
            result = fast_ensemble(prompts, _batches(images, labels), backbone=model, lam=0.0, process_group=group)
            assert torch.is_inference_mode_enabled()
            assert result.n_images == 2 * COUNT
    parts = [p.detach() if wrap == "DDP" else p.detach().to_local() for p in net.parameters()]
    return [part.numpy().tobytes() for part in parts], found


@pytest.fixture(scope="module")
def merged(together):
    return [answers[3] for answers in together]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return ranks.run(_many_things, WORLD, tmp_path_factory.mktemp("ranks"))


def test_ranks_stop_early_together(together):
    model, prompts, images, labels = _long_stream()
    options = {"backbone": model, "tolerance": 2.0, "folds": 4, "starts": 1}
    alone = fast_ensemble(prompts, _batches(images, labels, 20), **options)
    assert alone.n_images < 640
    by_h = fast_ensemble(prompts, _batches(images[:160], labels[:160], 20), lam=0.0, gradient_images=32, **options)
    assert by_h.n_images > 64, "the sample of the first look is compared with itself"
    for results, counts, (n_images, *h_scores) in (answers[0] for answers in together):
        assert n_images == by_h.n_images
        # H of float32 features of the same 32 images, under weights that agree to 1e-6.
        assert h_scores == pytest.approx([by_h.sample_h_score, by_h.sample_h_score_mixed_prompt], rel=1e-4)
        assert [bits for _, bits in results] == [bits for _, bits in together[0][0][0]]
        # Rounds of 4 x 5 images are batches of 20 of the same stream.
        assert counts[0] == alone.n_images
        assert counts[1] < 640
        for weights, _ in results[:2]:
            torch.testing.assert_close(weights, alone.weights, rtol=0, atol=1e-6)


def test_ranks_select_what_one_process_selects(together):
    alone = _selects(None)
    for _, selections, *_ in together:
        for (indices, weights, rounds, pairs, h_score), reference, first in zip(
            selections, alone, together[0][1], strict=True
        ):
            assert (indices, rounds, pairs) == (reference[0], reference[2], reference[3])
            torch.testing.assert_close(weights, reference[1], rtol=0, atol=1e-5)  # selection solves to a gap of 1e-4
            assert h_score == pytest.approx(reference[4], rel=1e-6)  # features are float32
            assert torch.equal(weights, first[1])
            assert h_score == first[4]


@pytest.mark.parametrize(
    ("case", "own", "message"),
    [
        ("lam", "DistributedError", r"rank 0 and rank 2 were not called alike \(lam: 1.0 and 0.5\)"),
        ("prompts", "DistributedError", r"rank 0 and rank 2 .*prompts: '"),
        ("backbone", "DistributedError", r"rank 0 and rank 2 .*backbone: '"),
        ("checkpoint", "DistributedError", r"rank 0 and rank 2 were not called alike \(checkpoint_dir: False and True"),
        ("option", "OptionError", r"rank 2 of 4 failed while checking the arguments: OptionError: folds must"),
        ("loader", "DataError", r"rank 2 of 4 failed while reading the images: DataError: .*the disk is gone"),
        ("loader, prompts", "DataError", r"rank 2 of 4 failed .*the disk is gone"),
        ("loader, looking", "DataError", r"rank 2 of 4 failed .*the disk is gone"),
        (
            "head, prompts",
            "RuntimeError",
            r"rank 2 of 4 failed while reading the images: RuntimeError: the head is off",
        ),
        (
            "head, looking",
            "RuntimeError",
            r"rank 2 of 4 failed while reading the images: RuntimeError: the head is off",
        ),
        ("report, prompts", "RuntimeError", r"rank 2 of 4 failed while reading the images: .*the screen is gone"),
        ("batches differ", "DistributedError", r"batch 0 of rank 2 is not that of rank 0"),
        ("fewer batches", "DistributedError", r"batch 8 of rank 2 is not that of rank 0"),
    ],
)
def test_an_error_of_one_rank_is_told_on_all(together, case, own, message):
    for rank, (_, _, told, *_) in enumerate(together):
        kind, text = told[case]
        assert kind == (own if rank == 2 else "DistributedError")
        if kind == "DistributedError":
            assert re.search(message, text), text


def test_an_error_of_all_is_told_on_all(together):
    for rank, (_, _, told, *_) in enumerate(together):
        assert told["no images"] == ("DataError", "the loaders of all ranks gave no images")
        assert told["one class"][0] == "DataError"
        # Only the first rank solves.
        assert told["solve"][0] == ("PromptError" if rank == 0 else "DistributedError")
        assert "rank 0 of 4 failed while solving for the weights: PromptError" in told["solve"][1] or rank == 0


@pytest.mark.parametrize("wrap", ["DDP", "FSDP"])
def test_training_goes_on_with_the_same_bits(together, wrap):
    model, prompts, images, labels = _problem()
    alone = fast_ensemble(prompts, _batches(images, labels), backbone=model)
    for answers in together:
        (parameters, found), (untouched, _) = answers[4:6] if wrap == "DDP" else answers[6:8]
        assert parameters == untouched
        assert len(found) == 3
        for weights in found:
            torch.testing.assert_close(weights, alone.weights, rtol=0, atol=1e-6)  # as above


def _dies(rank):
    model, prompts, images, labels = _problem()

    def dying():
        for number, batch in enumerate(_batches(images, labels)):
            if rank == 1 and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    began = time.monotonic()
    told = _told(lambda: fast_ensemble(prompts, dying(), backbone=model, process_group=dist.group.WORLD))
    return told, time.monotonic() - began


def test_ranks_outlive_one_that_is_killed(tmp_path):
    timeout = 30
    results = ranks.run(_dies, 3, tmp_path, timeout=timeout)
    assert results[1] == -signal.SIGKILL
    for rank in (0, 2):
        (kind, text), seconds = results[rank]
        assert kind == "DistributedError"
        assert f"rank {rank} of 3 lost touch with the others while reading the images" in text
        assert "start the job again" in text
        assert seconds < timeout


def _hangs(rank):
    """Rank 1 comes too late; the others stop when the group's timeout has passed."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    dist.barrier()
    model, prompts, images, labels = _problem()

    def slow():
        yield images, labels
        time.sleep(5 if rank == 1 else 0)

    told = _told(lambda: fast_ensemble(prompts, slow(), backbone=model, process_group=group))
    # The default group is not of hgprompt's making, and works on.
    return told, dist.all_reduce(torch.ones(1)) is None


def test_ranks_outlive_one_that_hangs(tmp_path):
    for told, _ in ranks.run(_hangs, 2, tmp_path):
        assert told[0] == "DistributedError"
        assert "within the group's timeout" in told[1]


def _merges(rank):
    """Statistics of ranks that keep different things, reduced; and what it took."""
    found = {}
    features, labels = _some_features()
    for kinds in (("features",) * 4, ("moments",) * 4, ("auto", "auto", "moments", "features")):
        part = EnsembleStatistics(folds=2, keep=kinds[rank])
        if rank != 1:
            part.update(features[:, UNEVEN[rank]], labels[UNEVEN[rank]])
        before = _bytes(copy.deepcopy(part.state_dict()))
        whole = part.reduced(dist.group.WORLD)
        assert _bytes(part.state_dict()) == before
        counted = Ranks(dist.group.WORLD)
        part.all_reduce(counted)
        assert _bytes(part.state_dict()) == _bytes(whole.state_dict())
        found[kinds] = part.state_dict(), sum(counted.handed.values())
    return found


def _bytes(value):
    """The same structure with tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: _bytes(v) for k, v in value.items()}
    return [_bytes(v) for v in value] if isinstance(value, list) else value


def _some_features():
    g = torch.Generator().manual_seed(3)
    labels = torch.cat([torch.randint(3, (COUNT - 1,), generator=g), torch.tensor([9])])
    # A mean far from zero: sums about zero would lose digits.
    return torch.randn(2, COUNT, 5, generator=g, dtype=torch.float64) + 1000 + labels[:, None], labels


def test_statistics_of_ranks_are_those_of_all_images(merged):
    features, labels = _some_features()
    reference = [Moments(2, 5) for _ in range(2)]
    folds = torch.cat([torch.from_numpy(folds_of(np.arange(len(labels[share])), 2)) for share in UNEVEN])
    for k, part in enumerate(reference):
        part.update(features[:, folds == k], labels[folds == k])
    for kinds, (first, _) in merged[0].items():
        for found in merged:
            assert _bytes(found[kinds][0]) == _bytes(first)
        if kinds[0] == "features":
            assert torch.equal(first["features"], features)
            assert torch.equal(first["labels"], labels)
            assert torch.equal(first["fold_of"], folds.int())
            continue
        for theirs, expected in zip(map(Moments.from_state_dict, first["moments"]), reference, strict=True):
            assert theirs.class_counts == expected.class_counts
            theirs.recentre(expected.centre)
            for a, b in _pairs(theirs, expected):
                # Float64 about a mean that all share: some digits of 16 are lost to sums of 41.
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _pairs(a, b):
    yield from zip((*a.rows, a.sums, a.third, a.fourth), (*b.rows, b.sums, b.third, b.fourth), strict=True)
    for label, total in a.class_sums.items():
        yield total, b.class_sums[label]


def test_what_ranks_hand_over_is_what_they_hold(merged):
    """Features go out once; of moments, one set per fold; and not once per rank."""
    m, h, classes, folds = 2, 5, 4, 2
    for rank, found in enumerate(merged):
        count = len(range(COUNT)[UNEVEN[rank]])
        small = 1500  # shapes, counts and what all agree on, in JSON
        sent = {kinds: volume for kinds, (_, volume) in found.items()}
        features = 8 * m * h * count + (8 + 4) * count
        assert 0 <= sent[("features",) * 4] - features < small
        moments = folds * (8 * (m * (m + 1) // 2 * h * h + m * h + h + 1) + classes * 8 * (m * h + 1))
        assert 0 <= sent[("moments",) * 4] - moments < small


def test_shares_are_as_equal_as_can_be():
    assert slices(7, 3) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert slices(2, 3) == [slice(0, 1), slice(1, 2), slice(2, 2)]


def test_a_group_is_needed_where_one_is_named():
    with pytest.raises(DistributedError, match="init_process_group"):
        EnsembleStatistics().all_reduce()
    with pytest.raises(DistributedError, match="init_process_group"):
        fast_ensemble(torch.zeros(2, 2, 16), [], backbone=literal.tiny_vit(), process_group=object())
    with pytest.raises(OptionError, match="shard must be"):
        fast_ensemble(torch.zeros(2, 2, 16), [], backbone=literal.tiny_vit(), shard="classes")


def test_nothing_keeps_a_group_that_was_destroyed():
    # What would: default arguments of torch.distributed.nn, were it imported (by timm, here) when there is a group.
    program = """
import torch.distributed as dist
import hgprompt.distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import timm
import torch.distributed.nn.functional as functional
assert functional.broadcast.__defaults__[-1] is None, functional.broadcast.__defaults__
dist.destroy_process_group()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
