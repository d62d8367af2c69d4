"""fitted_head against LDA written out and scikit-learn's; and tuning that starts from it."""

from __future__ import annotations

import literal
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hgprompt import DataError, FrozenViT, OptionError, encode
from hgprompt.data import LabelledImages
from hgprompt.tuning import TuneConfig, accuracy, fitted_head, random_prompt, tune
from hgprompt.tuning.learner import HEAD
from hgprompt.tuning.methods.linear import LinearLearner
from hgprompt.tuning.prompts import PromptLearner
from hgprompt.tuning.trainer import train

CONFIG = TuneConfig(epochs=2, batch_size=8, lr=0.5)
STILL = TuneConfig(epochs=1, batch_size=8, lr=0.0, weight_decay=0.0)


def _features(n=120, h=6, classes=3, seed=0, apart=2.0, skew=0.3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    means = apart * torch.randn(classes, h, generator=g)
    return means[labels] + torch.randn(n, h, generator=g) @ (
        torch.eye(h) + skew * torch.randn(h, h, generator=g)
    ), labels


@pytest.fixture(scope="module")
def vit():
    return FrozenViT.from_timm(literal.tiny_vit())


def _draw(seed, n=24):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 100, (n, 3, 16, 16), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return LabelledImages("set", pixels.to(torch.uint8), labels)


def test_decides_as_scikit_learns_shrunk_lda():
    lda = pytest.importorskip("sklearn.discriminant_analysis")
    features, labels = _features(n=400, apart=1.0)
    x, y = features.double().numpy(), labels.numpy()
    weight, bias = fitted_head(features.double(), labels, 3)
    # Shrinkage of the covariance within classes towards the multiple of the identity with its trace, as here; the
    # intensity is another estimate. With 400 images of 6 features both are small, and decisions differ at the edge.
    theirs = lda.LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01).fit(x, y)
    ours = (features @ weight.T + bias).argmax(1).numpy()
    assert np.mean(ours == theirs.predict(x)) > 0.97


def test_is_lda_divided_by_one_temperature():
    # Many images for each feature: shrinkage vanishes, and the discriminants are those of the formula.
    features, labels = _features(n=6000, apart=1.0, skew=0.0)
    x = features.double()
    weight, bias = fitted_head(x, labels, 3)
    means = torch.stack([x[labels == c].mean(0) for c in range(3)])
    within = sum((x[labels == c] - means[c]).T @ (x[labels == c] - means[c]) for c in range(3)) / len(x)
    exact = torch.linalg.solve(within, means.T).T
    offset = (1 / 3 * torch.ones(3)).log() - 0.5 * (means * exact).sum(1)
    # Differences between classes are all that counts; Ledoit-Wolf's intensity is about 1/N here.
    ours, theirs = x @ weight.double().T + bias, x @ exact.T + offset
    ours, theirs = ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
    factor = float((ours * theirs).sum() / (theirs * theirs).sum())
    assert 0.9 < factor <= 1.0  # Gaussian classes are LDA's own model: calibrated as it stands
    torch.testing.assert_close(ours, factor * theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_few_images_are_calibrated(monkeypatch):
    """With about as many images as features, new images' loss is below a guess's; without a temperature it is not."""
    features, labels = _features(n=2080, h=60, classes=8, apart=0.6)
    train_on, rest = slice(0, 80), slice(80, None)

    def loss():
        weight, bias = fitted_head(features[train_on], labels[train_on], 8)
        return float(F.cross_entropy(features[rest] @ weight.T + bias, labels[rest]))

    # Labels run 0 … 7 again and again: dealt out by place, each fold would be a class that no other fold knows.
    assert loss() < np.log(8)
    with monkeypatch.context() as patch:
        patch.setattr("hgprompt.tuning.head.inverse_temperatures", lambda *_: torch.ones(1, dtype=torch.float64))
        assert loss() > np.log(8)


def test_never_surer_than_lda_itself(monkeypatch):
    """Where every held-out image is classified rightly, the best temperature would be 0."""
    features, labels = _features(apart=30.0)
    heads = []
    for factor in (100.0, 1.0):  # the largest that `inverse_temperatures` gives, and LDA as it is
        one = torch.full((1,), factor, dtype=torch.float64)
        monkeypatch.setattr("hgprompt.tuning.head.inverse_temperatures", lambda *_, one=one: one)
        heads.append(fitted_head(features, labels, 3)[0])
    assert torch.equal(heads[0], heads[1])


def test_scale_of_the_features_changes_nothing():
    features, labels = _features()
    weight, bias = fitted_head(features, labels, 3)
    other, same = fitted_head(8 * features, labels, 3)
    torch.testing.assert_close(other * 8, weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(same, bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "classes", "of"),
    [(1, 1, 3), (2, 2, 3), (3, 1, 3), (5, 3, 3), (40, 3, 5)],
    ids=["one image", "two images", "one class", "few", "classes without images"],
)
def test_whatever_there_is_of_images(n, classes, of):
    features, labels = _features(n=n, classes=classes)
    weight, bias = fitted_head(features, labels, of)
    assert weight.shape == (of, 6)
    assert bias.shape == (of,)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    missing = sorted(set(range(of)) - set(labels.tolist()))
    assert not weight[missing].any()
    if n > 2:  # of two images of two classes nothing within a class is known
        logits = features @ weight.T + bias
        assert not set(logits.argmax(1).tolist()) & set(missing)


def test_constant_features_leave_the_priors():
    weight, bias = fitted_head(torch.ones(12, 4), torch.tensor([0] * 9 + [1] * 3), 2)
    assert not weight.any()
    assert bias[0] > bias[1]


def test_not_finite():
    with pytest.raises(DataError, match="finite"):
        fitted_head(torch.full((4, 3), float("nan")), torch.arange(4) % 2, 2)


def test_tuning_starts_from_it(vit):
    images, prompts = _draw(1), {"a": random_prompt(vit, 2, seed=1), "b": random_prompt(vit, 2, seed=2) * 3}
    tuned = tune(vit, prompts, images, config=STILL, head="fitted")
    for i, prompt in enumerate(prompts.values()):
        features = torch.cat([encode(vit, prompt[None], x)[0] for x, _ in images.batches(8)])
        weight, bias = fitted_head(features, images.labels, 3)
        torch.testing.assert_close(tuned.head_weight[i], weight, rtol=1e-4, atol=1e-5)  # another batch of prompts
        torch.testing.assert_close(tuned.head_bias[i], bias, rtol=1e-4, atol=1e-5)
    random = tune(vit, prompts, images, config=STILL)
    assert tuned.history[0]["train_accuracy"][0] > random.history[0]["train_accuracy"][0]


def test_points_of_a_grid_share_a_fit(vit, monkeypatch):
    calls = []
    monkeypatch.setattr("hgprompt.tuning.learner.fitted_head", lambda *a: calls.append(a) or fitted_head(*a))
    prompt, configs = random_prompt(vit, 2, seed=1), [CONFIG, CONFIG, CONFIG]
    learner = PromptLearner(vit, PromptLearner.start(vit, [prompt, prompt, 2 * prompt], 3, configs), head="fitted")
    learner.begin(_draw(1).batches(8))
    assert len(calls) == 2
    heads = [own[f"{HEAD}.weight"] for own in learner.parameters]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert all(head.is_leaf and head.requires_grad for head in heads)


def test_a_start_whose_features_are_not_finite_diverges_alone(vit):
    good = random_prompt(vit, 2, seed=1)
    found = []
    for prompts in ([good, good * 1e38], [good, good]):
        learner = PromptLearner(vit, PromptLearner.start(vit, prompts, 3, [CONFIG, CONFIG]), head="fitted")
        found.append(train(learner, [CONFIG, CONFIG], _draw(1)))
    assert found[0].diverged == (False, True)
    losses = [[record["loss"][0] for record in trained.history] for trained in found]
    # Features of another batch of prompts differ in float32, and the inverse covariance of 24 images enlarges that.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_linear_starts_from_it(vit):
    images = _draw(1)
    learner = LinearLearner(vit, 3, [STILL, STILL], "fitted")
    train(learner, [STILL, STILL], images)
    features = torch.cat([vit(x) for x, _ in images.batches(8)])
    weight, _ = fitted_head(features, images.labels, 3)
    torch.testing.assert_close(learner.parameters[1][f"{HEAD}.weight"].detach(), weight, rtol=1e-4, atol=1e-5)
    assert accuracy(learner, images).min() > 0.9


def test_goes_on_from_a_checkpoint_without_fitting_again(vit, tmp_path, monkeypatch):
    start, images = {"a": random_prompt(vit, 2, seed=1)}, _draw(1)
    undisturbed = tune(vit, start, images, config=CONFIG, head="fitted")

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 4:  # in the second of two epochs of three steps
            raise Stop

    with pytest.raises(Stop):
        tune(vit, start, images, config=CONFIG, head="fitted", checkpoint=tmp_path / "c.safetensors", progress=stop)
    with pytest.raises(OptionError, match="head"):
        tune(vit, start, images, config=CONFIG, checkpoint=tmp_path / "c.safetensors")

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("hgprompt.tuning.learner.fitted_head", never)
    resumed = tune(vit, start, images, config=CONFIG, head="fitted", checkpoint=tmp_path / "c.safetensors")
    assert torch.equal(resumed.prompts, undisturbed.prompts)
    assert torch.equal(resumed.head_weight, undisturbed.head_weight)


def test_unknown_head(vit):
    with pytest.raises(OptionError, match="'fitted'"):
        tune(vit, {"a": random_prompt(vit, 2)}, _draw(1), head="lda")


def test_classes_side_by_side_or_in_turn_are_one_task():
    """Sorted by class or dealt in turn, the images of a class go to the same folds, and the temperature is one."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) // 8
    features = torch.randn(24, 40, generator=g) + 0.3 * torch.randn(3, 40, generator=g)[labels]
    turns = torch.arange(24).view(3, 8).T.flatten()
    heads = fitted_head(features[turns], labels[turns], 3), fitted_head(features, labels, 3)
    for ours, theirs in zip(*heads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # sums of float32 in another order
