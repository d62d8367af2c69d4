"""train: runs side by side are what each would be alone, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import math

import literal
import pytest
import torch

from hgprompt import DataError, FrozenViT, OptionError
from hgprompt.data import LabelledImages
from hgprompt.tuning import PromptLearner, TuneConfig, accuracy, random_prompt, train, tune
from hgprompt.tuning.learner import Learner, linear_head

BASE = TuneConfig(epochs=3, batch_size=8, lr=4.0, head_lr=8.0, weight_decay=0.01, warmup=0.2, seed=5)
DIFFERENT = [
    BASE,
    dataclasses.replace(BASE, lr=1.0, seed=6),
    dataclasses.replace(BASE, weight_decay=0.0, prompt_dropout=0.3),
    dataclasses.replace(BASE, head_lr=None, seed=6),
]


@pytest.fixture(scope="module")
def vit():
    return FrozenViT.from_timm(literal.tiny_vit().double())


def _images(n=20, seed=0, classes=3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 60, (n, 3, 16, 16), generator=g)
    return LabelledImages("set", (noise + 70 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def _prompts(vit, configs, *, deep=False, micro_batch=None):
    starts = [random_prompt(vit, 3, deep=deep, seed=config.seed) for config in configs]
    return PromptLearner(vit, PromptLearner.start(vit, starts, 3, configs), configs, micro_batch=micro_batch)


class Linear(Learner):
    """A linear head on the mean colours: a learner with nothing of ours in it, that counts what it is asked."""

    caches = True

    def __init__(self, configs):
        self.parameters = [linear_head(3, 3, config.seed, torch.device("cpu")) for config in configs]
        self.buffers = [{"steps": torch.zeros((), dtype=torch.int64)} for _ in configs]
        self.prepared = 0

    def prepare(self, images):
        self.prepared += len(images)
        return images.double().mean((2, 3)).float() / 255

    def logits(self, inputs, *, step=None):
        if step is not None:
            for buffers in self.buffers:
                buffers["steps"] += 1
        weights = torch.stack([p["head.weight"] for p in self.parameters])
        return inputs @ weights.mT + torch.stack([p["head.bias"] for p in self.parameters])[:, None]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_runs_are_what_they_are_alone(vit, deep, optimizer):
    configs = [dataclasses.replace(config, optimizer=optimizer) for config in DIFFERENT]
    if optimizer == "adamw":
        configs = [dataclasses.replace(config, lr=config.lr / 50, head_lr=0.1) for config in configs]
    together = _prompts(vit, configs, deep=deep, micro_batch=7)
    all_at_once = train(together, configs, _images(), _images(9, seed=1), evaluate_every=2)
    for r, config in enumerate(configs):
        alone = _prompts(vit, [config], deep=deep)
        one = train(alone, [config], _images(), _images(9, seed=1), evaluate_every=2)
        for name, value in alone.parameters[0].items():
            # A float64 network; what differs is the blocking of float32 sums in the heads, and AdamW divides by small
            # second moments.
            torch.testing.assert_close(together.parameters[r][name], value, rtol=1e-4, atol=1e-5)
        for record, own in zip(all_at_once.history, one.history, strict=True):
            assert record["loss"][r] == pytest.approx(own["loss"][0], rel=1e-5)
            assert record["lr"][r] == own["lr"][0]
            for key in {"train_accuracy", "test_accuracy"} & set(own):
                assert record[key][r] == own[key][0]
    assert [record["epoch"] for record in all_at_once.history if "test_accuracy" in record] == [2, 3]


def test_a_seed_is_an_order_of_the_images_and_tune_is_a_run_of_it(vit):
    """tune has one seed and shares its batches: each of several seeds trains as tune alone does."""
    configs = [BASE, dataclasses.replace(BASE, seed=6)]
    learner = _prompts(vit, configs)
    train(learner, configs, _images())
    for r, config in enumerate(configs):
        tuned = tune(vit, {"a": random_prompt(vit, 3, seed=config.seed)}, _images(), config=config)
        torch.testing.assert_close(learner.parameters[r]["prompt"].detach(), tuned.prompt("a"), rtol=1e-4, atol=1e-5)


def test_a_run_that_diverges_leaves_the_others_alone(vit, tmp_path):
    hopeless = dataclasses.replace(BASE, lr=1e6, head_lr=1e6, weight_decay=1e3)
    configs = [BASE, hopeless, dataclasses.replace(BASE, lr=1.0)]
    configs = [dataclasses.replace(config, epochs=12) for config in configs]
    test = _images(9, seed=1)
    learner = _prompts(vit, configs)
    path = tmp_path / "run.safetensors"
    trained = train(learner, configs, _images(), test, checkpoint=path)
    assert trained.diverged == (False, True, False)
    assert math.isnan(trained.history[-1]["loss"][1])
    assert trained.history[-1]["train_accuracy"][1] == trained.accuracies[1] == 0.0
    assert all(value.isfinite().all() for value in learner.parameters[1].values())
    pair = _prompts(vit, configs[::2])
    without = train(pair, configs[::2], _images(), test)
    assert trained.accuracies[::2] == without.accuracies
    for name, value in pair.parameters[1].items():
        torch.testing.assert_close(learner.parameters[2][name], value, rtol=1e-4, atol=1e-5)
    # Once more, from its checkpoint, where it is done: the same, and the run is still marked.
    again = train(_prompts(vit, configs), configs, _images(), test, checkpoint=path)
    assert again.diverged == trained.diverged
    assert math.isnan(again.history[-1]["loss"][1])
    with pytest.raises(DataError, match=r"\['b'\] is not finite"):
        train(_prompts(vit, configs), configs, _images(), strict=True, names="abc")


class Stop(Exception):
    """Raised from a progress report, as an interruption would be."""


@pytest.mark.parametrize("make", [_prompts, lambda vit, configs: Linear(configs)], ids=["prompts", "linear"])
def test_an_interrupted_training_ends_with_the_same_bits(vit, tmp_path, make):
    hopeless = dataclasses.replace(BASE, lr=1e6, head_lr=1e6, weight_decay=1e3, seed=8)
    configs = [dataclasses.replace(config, epochs=6) for config in [*DIFFERENT, hopeless]]
    path, test = tmp_path / "run.safetensors", _images(9, seed=1)
    undisturbed = make(vit, configs)
    expected = train(undisturbed, configs, _images(), test, evaluate_every=1)

    def stop(at):
        def report(stage, done, total):
            if stage == "tuning" and done == at:
                raise Stop

        return report

    for at in (2, 8, 16):  # within the first epoch (nothing kept), the third and the sixth
        with pytest.raises(Stop):
            train(make(vit, configs), configs, _images(), test, evaluate_every=1, checkpoint=path, progress=stop(at))
    resumed = make(vit, configs)
    found = train(resumed, configs, _images(), test, evaluate_every=1, checkpoint=path)
    for mine, theirs in zip(resumed.parameters, undisturbed.parameters, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    if undisturbed.buffers:
        assert resumed.buffers == undisturbed.buffers
        assert int(resumed.buffers[0]["steps"]) == 18
    # NaN is not equal to itself, its repr is.
    assert [repr(sorted(r.items())) for r in found.history] == [repr(sorted(r.items())) for r in expected.history]
    with pytest.raises(OptionError, match=r"another run .it differs in "):
        train(make(vit, configs[:1] * 5), configs[:1] * 5, _images(), test, evaluate_every=1, checkpoint=path)


def test_what_is_cached_is_prepared_once():
    configs = [dataclasses.replace(BASE, lr=40.0, head_lr=None, epochs=20)]
    images = _images()
    learner = Linear(configs)
    trained = train(learner, configs, images)
    assert learner.prepared == len(images)
    assert math.isnan(trained.accuracies[0])
    assert trained.history[-1]["train_accuracy"][0] == float(accuracy(learner, images)) == 1.0
    # Several seeds read the same cache, each in its order.
    several = [dataclasses.replace(config, seed=s) for config in configs for s in (1, 2)]
    pair = Linear(several)
    train(pair, several, images)
    assert pair.prepared == len(images)
    for r, config in enumerate(several):
        one = Linear([config])
        train(one, [config], images)
        torch.testing.assert_close(pair.parameters[r], one.parameters[0], rtol=1e-5, atol=1e-6)  # float32 sums


def test_refuses_runs_that_do_not_go_together(vit):
    learner = _prompts(vit, DIFFERENT)
    for change in ({"epochs": 4}, {"batch_size": 4}, {"optimizer": "adamw"}, {"warmup": 0.0}):
        configs = [*DIFFERENT[:3], dataclasses.replace(BASE, **change)]
        with pytest.raises(OptionError, match=next(iter(change))):
            train(learner, configs, _images())
    with pytest.raises(OptionError, match="4 runs and 3 configs"):
        train(learner, DIFFERENT[:3], _images())
