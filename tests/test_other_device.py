"""Nothing is mixed up that is on a GPU with what is not: checked where there is no GPU. `test_cuda.py` has one."""

from __future__ import annotations

import literal
import pytest
import torch

pytest.importorskip("triton")
from other_device import on_gpu, other_device

from hgprompt import EnsembleStatistics, WeightProblem, alignment_loss, fast_ensemble, h_score, select_prompts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    with other_device(monkeypatch):
        yield


def _problem():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(36) // 2 % 3
    images = torch.randn(36, 3, 16, 16, generator=g) + labels[:, None, None, None]
    return torch.randn(3, 2, 16, generator=g), [(images[i : i + 9], labels[i : i + 9]) for i in range(0, 36, 9)]


def test_the_device_is_what_it_is_taken_for():
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert [on_gpu(there), there.is_cuda, there.device.type] == [True, True, "cuda"]
    assert [on_gpu(here), here.is_cuda, here.device.type] == [False, False, "cpu"]
    assert (there * 2 + torch.ones_like(there)).is_cuda  # a number of the CPU is no stranger
    assert [x.is_cuda for x in (there.cpu(), here.to(there), there.double())] == [False, True, True]
    for mix in (
        lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.bool()], there.numpy,
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()), there.pin_memory,
    ):  # fmt: skip
        with pytest.raises((RuntimeError, TypeError)):
            mix()


@pytest.mark.parametrize(
    ("keep", "options"),
    [
        *(("features", options) for options in (
            {}, {"head": "lda"}, {"head": "centroid"}, {"dtype": torch.bfloat16}, {"tolerance": 0.5}, {"folds": 1},
            {"gradient_images": 20}, {"gradient_images": 0, "lam": 0.0}, {"shrinkage": 0.0},
            {"solver": "projected-gradient", "max_steps": 5},
        )),
        *(("moments", options) for options in ({}, {"head": "lda"}, {"tolerance": 0.5}, {"gradient_images": 20})),
    ],
    ids=str,
)  # fmt: skip
def test_an_ensemble(keep, options):
    prompts, loader = _problem()
    model = literal.tiny_vit()
    there = fast_ensemble(prompts, loader, backbone=model, device="cuda", keep=keep, **options)
    assert [on_gpu(there.weights), on_gpu(there.prompt)] == [False, False]
    if not options:
        again = fast_ensemble(
            prompts.cuda(), [(x.cuda(), y.cuda()) for x, y in loader], backbone=model, device="cuda", keep=keep
        )
        torch.testing.assert_close(again.weights, there.weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_loader_may_fill_one_buffer_again_and_again(where):
    """As those do that decode on a GPU, or into pinned memory."""
    prompts, loader = _problem()
    images, labels = torch.empty(9, 3, 16, 16).to(where), torch.empty(9, dtype=torch.int64).to(where)

    def refilled():
        for own in loader:
            images.copy_(own[0])
            labels.copy_(own[1])
            yield images, labels

    options = {"backbone": literal.tiny_vit(), "device": "cuda"}
    expected = fast_ensemble(prompts, loader, **options)
    found = fast_ensemble(prompts, refilled(), **options)
    assert torch.equal(found.source_h_scores, expected.source_h_scores)
    assert torch.equal(found.gradient_cosines, expected.gradient_cosines)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_a_resumed_pass(keep, tmp_path):
    prompts, loader = _problem()

    class Broken(list):
        def __iter__(self):
            yield from self[:3]
            raise ValueError("gone")

    options = {"backbone": literal.tiny_vit(), "device": "cuda", "keep": keep}
    expected = fast_ensemble(prompts, loader, **options)
    with pytest.raises(Exception, match="gone"):
        fast_ensemble(prompts, Broken(loader), checkpoint_dir=tmp_path, **options)
    assert torch.equal(fast_ensemble(prompts, loader, checkpoint_dir=tmp_path, **options).weights, expected.weights)


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_statistics_and_what_is_made_of_them(keep):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    features = torch.randn(4, 40, 12, generator=g) + torch.randn(4, 3, 12, generator=g)[:, labels]
    kept = EnsembleStatistics(folds=4, keep=keep)
    for start in range(0, 40, 15):
        kept.update(features[:, start : start + 15].cuda(), labels[start : start + 15])
    problem = WeightProblem(kept)
    found = problem.solve(0.0)
    problem.jackknife(found, None, 0.0)
    problem.leave_one_out(0.0)
    problem.h_score_std(found.weights)
    other = EnsembleStatistics(folds=4, keep=keep)
    other.load_state_dict(kept.state_dict())
    other.merge(kept)
    other.h_score(found.weights)
    assert problem.source_covariance.shape == (4, 4)


@pytest.mark.parametrize("method", ["halving", "greedy", "ranking"])
def test_selection(method):
    _, loader = _problem()
    pool = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0))
    select_prompts(pool, loader * 3, size=3, backbone=literal.tiny_vit(), device="cuda", method=method)


def test_scores():
    features, labels = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    for where in (labels, labels.cuda()):
        h_score(features.cuda(), where)
    alignment_loss(features[:3].cuda(), torch.full((3,), 1 / 3))  # as α comes from a result
