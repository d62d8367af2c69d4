"""hgprompt in somebody else's program: inference mode, file modes, warnings, heads and loaders of the caller's own."""

from __future__ import annotations

import os
import threading
import warnings

import literal
import pytest
import torch

from hgprompt import (
    BackboneError,
    DataError,
    EnsembleResult,
    EnsembleStatistics,
    FileFormatError,
    FrozenViT,
    HGPromptWarning,
    OptionError,
    PromptPool,
    encode,
    fast_ensemble,
    load_backbone,
    select_prompts,
)
from hgprompt.data import ImageDataset, decode, render_task
from hgprompt.files import write_bytes

PROMPTS = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))


def _loader():
    labels = torch.arange(36) % 3
    images = torch.randn(36, 3, 16, 16, generator=torch.Generator().manual_seed(0)) + labels[:, None, None, None]
    return [(images[i : i + 9], labels[i : i + 9]) for i in range(0, 36, 9)]


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_statistics_may_begin_in_inference_mode(keep):
    features, labels = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3

    def gather(mode):
        kept, more = EnsembleStatistics(keep=keep, folds=2), EnsembleStatistics(keep=keep, folds=2)
        with torch.inference_mode(mode):
            kept.update(features + 0, labels)
            more.update(2 * features, labels)
        kept.update(3 * features, labels)
        kept.merge(more)
        return kept.h_score(torch.ones(3))

    assert gather(True) == gather(False)


@pytest.mark.parametrize("make", [literal.tiny_vit, lambda: "mini"], ids=["model", "name"])
def test_a_network_that_was_packed_in_inference_mode_passes_gradients(make):
    with torch.inference_mode():
        made = make()
        vit = load_backbone(made, device="cpu", img_size=16) if made == "mini" else FrozenViT.from_timm(made)
    prompts = torch.randn(2, 2, vit.width, requires_grad=True)
    encode(vit, prompts, _loader()[0][0]).sum().backward()
    assert prompts.grad is not None
    assert bool(prompts.grad.abs().sum() > 0)


def test_files_have_the_modes_of_the_umask_which_is_left_alone(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"a")
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640

        def work(name):
            for _ in range(40):
                write_bytes(tmp_path / name, b"b")

        writers = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(4)]
        for thread in writers:
            thread.start()
        seen = set()
        while any(thread.is_alive() for thread in writers):
            (tmp_path / "other").touch()
            seen.add((tmp_path / "other").stat().st_mode & 0o777)
            (tmp_path / "other").unlink()
        assert seen <= {0o640}
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


def test_warnings_name_the_callers_line():
    model = literal.tiny_vit()
    pool, vit = PromptPool(PROMPTS, backbone=FrozenViT.from_timm(model)), FrozenViT.from_timm(model)
    vit.set_preprocessing(mean=(0.1, 0.1, 0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast_ensemble(pool, _loader(), backbone=vit)
        fast_ensemble(PROMPTS, _loader(), backbone=model, head=lambda features: 0 * features[:, :3])
        vit.info  # noqa: B018 - a line further down, which none of them may name
    ours = [one for one in caught if issubclass(one.category, HGPromptWarning)]
    assert {str(one.message)[:11] for one in ours} >= {"the prompts", "prompts ['p"}
    assert {one.filename for one in ours} == {__file__}


def test_heads_in_training_mode():
    model = literal.tiny_vit()
    for layer in (torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.1)):
        head = torch.nn.Sequential(layer, torch.nn.Linear(16, 3))
        with pytest.raises(OptionError, match=f"{type(layer).__name__}.*eval"):
            fast_ensemble(PROMPTS, _loader(), backbone=model, head=head)
        fast_ensemble(PROMPTS, _loader(), backbone=model, head=head.eval())
    with pytest.raises(DataError, match="gives logits NoneType"):
        fast_ensemble(PROMPTS, _loader(), backbone=model, head=lambda features: None)


def test_normalised_batches_and_batches_of_bytes_do_not_mix():
    """Together in one sample, bytes would have become floats, and missed the normalisation that they need."""
    (images, labels), *rest = _loader()
    in_bytes = (60 * images + 128).clamp(0, 255).to(torch.uint8), labels
    for loader in ([in_bytes, *rest], [*rest, in_bytes]):
        with pytest.raises(DataError, match=r"batch \d of the loader is torch\.\w+: uint8 and normalised floats"):
            fast_ensemble(PROMPTS, loader, backbone=literal.tiny_vit())


class _Counted(list):
    reads = 0

    def __iter__(self):
        for batch in super().__iter__():
            self.reads += 1
            yield batch


@pytest.mark.parametrize(
    "options",
    [
        {"size": 2.5}, {"size": "2"}, {"size": 9}, {"budget": "x"}, {"num_images": 1.5}, {"shrinkage": "no"},
        {"impl": "no"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("method", ["halving", "greedy"])
def test_selection_checks_its_options_before_it_reads(options, method):
    loader = _Counted(_loader())
    with pytest.raises(OptionError, match=next(iter(options))):
        select_prompts(PROMPTS, loader, backbone=literal.tiny_vit(), method=method, **({"size": 2} | options))
    assert loader.reads == 0


def test_what_the_papers_preset_leaves_open_can_be_given():
    def run(**options):
        return fast_ensemble(PROMPTS, _loader(), backbone=literal.tiny_vit(), preset="paper", folds=1, **options)

    whole = run()
    assert whole.settings["max_steps"] == 1000
    few = run(max_steps=1, learning_rate=1e-3)
    assert (few.settings["max_steps"], few.settings["learning_rate"]) == (1, 1e-3)
    assert not few.converged
    # One step of 1e-3 from uniform moves no weight further than the gradient is long.
    assert 0 < float((few.weights - 1 / 3).abs().sum()) < float((whole.weights - 1 / 3).abs().sum())
    # It does not stop at the tolerance, and says whether it was reached.
    for tolerance in (0.99 * few.gap, 1.01 * few.gap):
        assert run(max_steps=1, learning_rate=1e-3, gap_tolerance=tolerance).converged == (tolerance > few.gap)


@pytest.mark.parametrize("options", [{}, {"keep": "moments", "head": "lda"}, {"gradient_images": 20}], ids=str)
def test_a_loader_may_use_its_memory_again(options):
    loader = [(images.double(), labels.clone()) for images, labels in _loader()]

    def reusing():
        images, labels = torch.empty_like(loader[0][0]), torch.empty_like(loader[0][1])
        for own, answers in loader:
            yield images.copy_(own), labels.copy_(answers)

    model = literal.tiny_vit().double()
    ours, theirs = (fast_ensemble(PROMPTS, one, backbone=model, **options) for one in (reusing(), loader))
    assert torch.equal(ours.weights, theirs.weights)
    assert torch.equal(ours.gradient_cosines, theirs.gradient_cosines)


@pytest.mark.parametrize("scale", [1, 255], ids=["0 to 1", "0 to 255"])
def test_pixels_that_were_not_normalised_are_warned_of(scale):
    vit = FrozenViT.from_timm(literal.tiny_vit()).set_preprocessing(mean=[0.5] * 3, std=[0.25] * 3)
    images, labels = torch.rand(36, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(36) % 3
    with pytest.warns(HGPromptWarning, match=r"floating point from .* give uint8, or normalise"):
        fast_ensemble(PROMPTS, [(scale * images, labels)], backbone=vit, lam=0, gradient_images=0)
    fast_ensemble(PROMPTS, [((images - 0.5) / 0.25, labels)], backbone=vit, lam=0, gradient_images=0)  # without one


def test_a_dataset_is_no_loader():
    dataset = torch.utils.data.TensorDataset(*_loader()[0])
    with pytest.raises(DataError, match=r"got one image \[3, 16, 16\]: a Dataset goes into a DataLoader"):
        fast_ensemble(PROMPTS, dataset, backbone=literal.tiny_vit())


def test_heads_that_do_not_fit_the_features():
    """A module's error is put in words; what a function raises is left as it is."""
    for head in (torch.nn.Linear(15, 3), torch.nn.Linear(16, 3).double()):
        with pytest.raises(DataError, match=r"the head failed on features \[\d, 16\] torch.float32"):
            fast_ensemble(PROMPTS, _loader(), backbone=literal.tiny_vit(), head=head)

    def off(features):
        raise RuntimeError("the head is off")

    with pytest.raises(RuntimeError, match=r"^the head is off$"):
        fast_ensemble(PROMPTS, _loader(), backbone=literal.tiny_vit(), head=off)


def test_a_pool_of_a_network_of_ones_own_asks_for_it():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    pool = PromptPool(PROMPTS, backbone=vit.info)
    with pytest.raises(BackboneError, match=r"that the prompts name could not be loaded .*: pass backbone="):
        fast_ensemble(pool, _loader())
    with pytest.raises(BackboneError, match="interpolation must be one of bicubic"):
        vit.set_preprocessing(interpolation="cubist")
    with pytest.raises(BackboneError, match=r"multiples of the mini .* got 60"):
        load_backbone("mini", device="cpu", img_size=60)


def test_files_of_another_kind_are_named(tmp_path):
    fast_ensemble(PROMPTS, _loader(), backbone=literal.tiny_vit(), lam=0, gradient_images=0).save(tmp_path)
    with pytest.raises(FileFormatError, match="is an ensemble, but no prompt pool"):
        PromptPool.load(tmp_path / "ensemble.safetensors")
    with pytest.raises(FileFormatError, match=r"report.json is no safetensors file"):
        PromptPool.load(tmp_path / "report.json")


def test_one_pass_answers_more_than_one_question(tmp_path):
    options = {"backbone": literal.tiny_vit(), "folds": 2}
    result = fast_ensemble(PROMPTS, _loader(), lam=0.3, keep_problem=True, **options)
    assert torch.equal(result.problem.solve(0.3).weights, result.weights)
    # Another pass with another λ: the same statistics, and gradients of the same sample.
    other = fast_ensemble(PROMPTS, _loader(), lam=0.05, **options)
    assert other.problem is None
    torch.testing.assert_close(result.problem.path([0.05])[0].weights, other.weights, rtol=0, atol=1e-4)
    assert [solution.weights[i] for i, solution in enumerate(result.problem.leave_one_out(0.3))] == [0, 0, 0]
    with pytest.raises(OptionError, match="sequence of numbers"):
        result.problem.path(0.3)
    result.save(tmp_path)
    assert EnsembleResult.load(tmp_path).problem is None


def test_sizes_are_pairs_or_single_numbers():
    one, pair = (render_task("azimuth", 2, image_size=size).images for size in (32, (32, 32)))
    assert torch.equal(one, pair)
    for size in ((32, 48), "32", 3.5):
        with pytest.raises(OptionError, match="image_size"):
            render_task("azimuth", 2, image_size=size)
    for size in ((1, 2, 3), 0, None):
        with pytest.raises(OptionError, match="image_size"):
            ImageDataset([], size)
    assert ImageDataset([], 32).image_size == (32, 32)
    with pytest.raises(DataError, match="what load_task makes of a folder, got str"):
        decode("stones", 32)
