"""The trainer against the same training written with timm's modules, autograd and nothing of ours."""

from __future__ import annotations

import dataclasses
import itertools
import math

import literal
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from hgprompt import BackboneError, DataError, FrozenViT, OptionError, PromptError, PromptPool
from hgprompt.data import ImageDataset, LabelledImages, load_task, open_images
from hgprompt.errors import FileFormatError, OutputError
from hgprompt.tuning import TuneConfig, TuneResult, checkpoint, evaluate, random_prompt, tune
from hgprompt.tuning.config import TuneConfig as Config
from hgprompt.tuning.prompts import PromptLearner
from hgprompt.tuning.trainer import train

CONFIG = TuneConfig(epochs=3, batch_size=8, lr=4.0, head_lr=8.0, weight_decay=0.01, warmup=0.2, seed=5)


@pytest.fixture(scope="module")
def model():
    return literal.tiny_vit()


@pytest.fixture(scope="module")
def vit(model):
    return FrozenViT.from_timm(model)


@pytest.fixture(scope="module")
def images():
    return _images(20)


def _images(n, seed=0, classes=3):
    """Classes that differ in brightness, so that there is something to learn."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 3, 16, 16), generator=g)
    return LabelledImages("set", (noise + 70 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def _starts(vit, names=("a", "b"), deep=False):
    return {name: random_prompt(vit, 3, deep=deep, seed=i) for i, name in enumerate(names)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_is_the_literal_training(model, vit, images, optimizer, deep):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    if optimizer == "adamw":
        config = dataclasses.replace(config, lr=0.3, head_lr=0.3)
    starts = _starts(vit, deep=deep)
    result = tune(vit, starts, images, config=config, micro_batch=5)
    for k, (name, start) in enumerate(starts.items()):
        prompt, head, losses = literal.tune(model, start, images, config, 3)
        # Two float32 roads through the same network, 9 steps long; AdamW divides by small second moments.
        tolerance = {"rtol": 2e-3, "atol": 2e-4} if optimizer == "adamw" else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(result.prompt(name), prompt, **tolerance)
        torch.testing.assert_close(result.head_weight[k], head.weight.detach(), **tolerance)
        last = sum(loss * n for loss, n in zip(losses[-3:], (8, 8, 4), strict=True)) / 20
        assert result.history[-1]["loss"][k] == pytest.approx(last, rel=1e-3)


def test_runs_do_not_influence_one_another(vit, images):
    starts = _starts(vit, ("a", "b", "c"))
    together = tune(vit, starts, images, config=CONFIG)
    for name, start in starts.items():
        alone = tune(vit, {name: start}, images, config=CONFIG)
        # The same sums in another blocking.
        torch.testing.assert_close(alone.prompt(name), together.prompt(name), rtol=1e-3, atol=1e-4)


def test_learns_and_evaluates(vit, images):
    test = _images(30, seed=1)
    config = TuneConfig(epochs=15, batch_size=10, lr=10.0, head_lr=20.0)
    result = tune(vit, _starts(vit), images, test=test, config=config, evaluate_every=5)
    assert [r["epoch"] for r in result.history if "test_accuracy" in r] == [5, 10, 15]
    assert min(result.history[-1]["test_accuracy"]) > 0.9  # brightness alone tells the classes apart; chance is 0.33
    assert result.history[-1]["loss"][0] < result.history[0]["loss"][0]
    again = evaluate(vit, result.prompts, result.head_weight, result.head_bias, test, batch_size=7)
    assert again.tolist() == result.history[-1]["test_accuracy"]
    assert result.accuracy("b") == again[1]


def test_images_on_disk_train_as_images_in_memory(vit, tmp_path):
    g = torch.Generator().manual_seed(0)
    for label in ("dark", "light"):
        (tmp_path / label).mkdir()
        for i in range(5):
            pixels = torch.randint(0, 255, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    task = load_task(tmp_path)
    in_memory, on_disk = open_images(task, (16, 16)), open_images(task, (16, 16), max_bytes=100)
    assert isinstance(in_memory, LabelledImages)
    assert isinstance(on_disk, ImageDataset)
    state = torch.get_rng_state()
    results = [tune(vit, _starts(vit), images, test=images, config=CONFIG) for images in (in_memory, on_disk)]
    assert torch.equal(results[0].prompts, results[1].prompts)
    assert results[0].history == results[1].history
    assert results[1].class_names == ("dark", "light")
    assert torch.equal(torch.get_rng_state(), state)


def test_start_and_images_stay_as_they_are(vit, images):
    starts = _starts(vit)
    before = {name: start.clone() for name, start in starts.items()}
    pixels = images.images.clone()
    state = torch.get_rng_state()
    tune(vit, starts, images, config=CONFIG)
    assert all(torch.equal(starts[name], before[name]) for name in starts)
    assert torch.equal(images.images, pixels)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_zeroes_its_share_of_the_prompt_and_of_its_gradient(vit, images):
    config = dataclasses.replace(CONFIG, prompt_dropout=0.5)
    dropped = tune(vit, _starts(vit), images, config=config)
    assert torch.equal(dropped.prompts, tune(vit, _starts(vit), images, config=config).prompts)
    assert not torch.equal(dropped.prompts, tune(vit, _starts(vit), images, config=CONFIG).prompts)
    # One step without momentum or decay: what was dropped has no gradient and has not moved.
    one = TuneConfig(epochs=1, batch_size=20, lr=5.0, weight_decay=0.0, warmup=0.0, prompt_dropout=0.5)
    start = _starts(vit)["a"]
    moved = tune(vit, {"a": start}, images, config=one).prompt("a") != start
    # 48 elements: four standard deviations of a fair coin are 0.29.
    assert abs(float(moved.double().mean()) - 0.5) < 0.29


class Stop(Exception):
    """Raised from a progress report, as an interruption would be."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_interrupted_run_ends_with_the_same_bits(vit, images, tmp_path, optimizer):
    config = dataclasses.replace(CONFIG, optimizer=optimizer, epochs=5, prompt_dropout=0.1)
    test = _images(9, seed=2)
    undisturbed = tune(vit, _starts(vit), images, test=test, config=config, evaluate_every=2)
    path = tmp_path / "run.safetensors"

    def interrupt_at(step):
        def report(stage, done, total):
            if done == step:
                raise Stop

        return report

    for step in (2, 7, 11):  # within the first epoch (nothing kept), the third and the fourth
        with pytest.raises(Stop):
            tune(
                vit, _starts(vit), images, test=test, config=config, evaluate_every=2, checkpoint=path,
                progress=interrupt_at(step),
            )  # fmt: skip
    resumed = tune(vit, _starts(vit), images, test=test, config=config, evaluate_every=2, checkpoint=path)
    assert torch.equal(resumed.prompts, undisturbed.prompts)
    assert torch.equal(resumed.head_weight, undisturbed.head_weight)
    assert resumed.history == undisturbed.history
    # And once more, when it is done already.
    assert torch.equal(
        tune(vit, _starts(vit), images, test=test, config=config, evaluate_every=2, checkpoint=path).prompts,
        undisturbed.prompts,
    )


def test_a_checkpoint_of_another_run_is_refused(vit, images, tmp_path):
    path = tmp_path / "run.safetensors"
    tune(vit, _starts(vit), images, config=CONFIG, checkpoint=path)
    before = path.read_bytes()
    for change, starts, data in (
        ("lr, 4.0 and not 1.0", _starts(vit), images),
        ("starts", {"a": torch.zeros(3, 16), "b": torch.zeros(3, 16)}, images),
        ("train", _starts(vit), _images(20, seed=9)),
    ):
        config = dataclasses.replace(CONFIG, lr=1.0) if change.startswith("lr") else CONFIG
        with pytest.raises(OptionError, match=f"another run.*{change}"):
            tune(vit, starts, data, config=config, checkpoint=path)
    assert path.read_bytes() == before
    other = FrozenViT.from_timm(literal.tiny_vit().double()).set_preprocessing(std=(5.0, 5.0, 5.0))
    with pytest.raises(OptionError, match=r"another run.*normalisation"):
        tune(other, _starts(vit), images, config=CONFIG, checkpoint=path)
    path.write_bytes(before[: len(before) // 2])
    with pytest.raises(FileFormatError):
        tune(vit, _starts(vit), images, config=CONFIG, checkpoint=path)


def test_a_place_for_checkpoints_is_tried_at_once_and_a_full_disk_costs_no_training(vit, images, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        tune(vit, _starts(vit), images, config=CONFIG, checkpoint=tmp_path / "file" / "run.safetensors", progress=_fail)

    def full(*_, **__):
        raise OutputError("no space")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.warns(UserWarning, match="the training goes on: no space") as warned:
        found = tune(vit, _starts(vit), images, config=CONFIG, checkpoint=tmp_path / "new" / "run.safetensors")
    assert len(warned) == 1
    assert len(found.history) == CONFIG.epochs


def _fail(*_):
    raise AssertionError("training has begun")


def test_refuses_what_cannot_be_tuned(vit, images):
    one_class = LabelledImages("set", images.images, torch.zeros(20, dtype=torch.int64))
    for arguments, error, message in (
        (({}, images), PromptError, "at least one"),
        (({"a": torch.zeros(3, 7)}, images), PromptError, "7 wide"),
        (({"a": [[0.0] * 16]}, images), PromptError, "floating point.*got list"),
        (({"a": torch.zeros(3, 16, dtype=torch.int64)}, images), PromptError, "floating point.*int64"),
        (({"a": torch.zeros(3, 16), "b": torch.zeros(2, 16)}, images), PromptError, "one shape"),
        ((_starts(vit), images.subset(torch.arange(0))), DataError, "no images"),
        ((_starts(vit), one_class), OptionError, "at least 2 classes"),
    ):
        with pytest.raises(error, match=message):
            tune(vit, *arguments, config=CONFIG)
    with pytest.raises(DataError, match="classes from 0 to 1"):
        tune(vit, _starts(vit), images, num_classes=2, config=CONFIG)
    with pytest.raises(DataError, match="not finite"):
        tune(vit, _starts(vit), images, config=TuneConfig(epochs=30, lr=1e6, head_lr=1e6, weight_decay=1e3))


def test_refuses_tests_on_other_classes(vit, images):
    named = dataclasses.replace(images, class_names=("a", "b", "c"))
    turned = dataclasses.replace(images, class_names=("c", "b", "a"))
    with pytest.raises(DataError, match="label 0 is 'c' there, and 'a' in training"):
        tune(vit, _starts(vit), named, test=turned, config=CONFIG)


@pytest.mark.parametrize("make", [list, lambda images: DataLoader(images), lambda images: Subset(images, [0])])
def test_refuses_what_are_no_labelled_images(vit, images, make):
    with pytest.raises(DataError, match=r"train must be LabelledImages\(name"):
        tune(vit, _starts(vit), make(images), config=CONFIG)


def test_refuses_starts_of_another_network_or_of_no_numbers(vit, images):
    other = dataclasses.replace(vit.info, fingerprint="0" * 64)
    with pytest.raises(PromptError, match="tuned for backbone"):
        tune(vit, PromptPool(_starts(vit), backbone=other), images, config=CONFIG)
    with pytest.raises(PromptError, match="start 'b' holds NaN"):
        tune(vit, _starts(vit) | {"b": torch.full((3, vit.width), torch.nan)}, images, config=CONFIG)
    with pytest.raises(BackboneError, match="must be a FrozenViT"):
        random_prompt(literal.tiny_vit(), 3)


def test_every_output_has_a_name(vit, images, tmp_path):
    """Heads may have more of them than the training images have names for."""
    named = dataclasses.replace(images, class_names=("a", "b", "c"))
    more = dataclasses.replace(_images(8, classes=4), class_names=("a", "b", "c", "d"))
    brief = dataclasses.replace(CONFIG, epochs=1)
    for options, names in (
        ({"num_classes": 5}, ("a", "b", "c", "class 3", "class 4")),
        ({"test": more}, tuple("abcd")),
    ):
        tune(vit, _starts(vit), named, config=brief, **options).save(tmp_path)
        assert TuneResult.load(tmp_path).class_names == names


def test_rate_rises_and_falls():
    config = Config(warmup=0.1)
    rates = [config.rate(step, 100) for step in range(100)]
    assert rates[10] == 1 == max(rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:11]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[0] < 0.1
    assert 0 <= rates[-1] < 1e-3
    assert Config(warmup=0.0).rate(0, 1) == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"batch_size": 0}, {"optimizer": "lion"}, {"lr": -1.0}, {"lr": math.nan}, {"warmup": 1.0},
        {"prompt_dropout": -0.1}, {"seed": -1},
    ],
)  # fmt: skip
def test_config_refuses(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        TuneConfig(**bad)


def test_random_start_is_vpts(vit):
    bound = math.sqrt(6 / (3 * 8 * 8 + 16))
    prompt = random_prompt(vit, 500, seed=1)
    assert prompt.shape == (500, 16)
    assert float(prompt.abs().max()) < bound
    assert float(prompt.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)  # 8000 uniform numbers
    assert random_prompt(vit, 2, deep=True).shape == (3, 2, 16)
    assert torch.equal(random_prompt(vit, 500, seed=1), prompt)
    with pytest.raises(OptionError, match="at least 1 token"):
        random_prompt(vit, 0)


def test_runs_of_several_seeds_see_the_same_on_disk_and_in_memory(tmp_path):
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    g = torch.Generator().manual_seed(0)
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = torch.randint(0, 255, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "ab"[i % 2] / f"{i:02}.png")
    base = TuneConfig(epochs=2, batch_size=8, lr=4.0)
    configs = [dataclasses.replace(base, seed=seed) for seed in (6, 5, 5)]
    found = []
    for max_bytes in (0, 10**9):
        images = open_images(load_task(tmp_path), (16, 16), max_bytes=max_bytes)
        starts = PromptLearner.start(vit, [random_prompt(vit, 3, seed=0)] * 3, 2, configs)
        learner = PromptLearner(vit, starts, configs)
        train(learner, configs, images)
        found.append(torch.stack([own["prompt"].detach() for own in learner.parameters]))
    assert torch.equal(*found)
