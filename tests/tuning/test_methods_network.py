"""The methods without prompts against timm's and torch's own modules."""

from __future__ import annotations

import copy

import literal
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from hgprompt import FrozenViT, OptionError, encode
from hgprompt.bundled import mini_model
from hgprompt.data import LabelledImages
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Setting
from hgprompt.tuning.methods.adapter import HOULSBY_STD, Adapter
from hgprompt.tuning.methods.bias import Bias
from hgprompt.tuning.methods.linear import FittedLinear, Linear
from hgprompt.tuning.methods.mlp import MLP
from hgprompt.tuning.methods.partial import Partial
from hgprompt.tuning.methods.sidetune import SideTune

CLASSES = 4
CONFIGS = [TuneConfig(seed=1), TuneConfig(seed=2), TuneConfig(seed=1)]
METHODS = [
    Linear(),
    FittedLinear(),
    MLP(2),
    MLP(5),
    Partial(1),
    Partial(3),
    Adapter(4),
    Adapter(4, "vpt"),
    SideTune(),
    Bias(),
]
NETWORKS = {
    "plain": {},
    "LayerScale, mean, classifier": {"init_values": 0.5, "global_pool": "avg", "num_classes": 7},
    "QK-norm, pre-norm, registers": {"qk_norm": True, "pre_norm": True, "reg_tokens": 2},
}

# Two float32 roads through a network of three blocks, features of order one.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def identity(value):
    if isinstance(value, Adapter):
        return f"Adapter-{value.init}"
    return getattr(value, "name", None)


def coloured(count, size=16, seed=0):
    """Each class has a colour of its own, under noise."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.tensor([[60, 60, 160], [160, 60, 60], [60, 160, 60], [130, 130, 130]])
    noise = torch.randint(0, 90, (count, 3, size, size), generator=source)
    return LabelledImages("colours", (noise + colours[labels][:, :, None, None]).to(torch.uint8), labels)


def setting_of(model, images):
    return Setting(FrozenViT.from_timm(model), lambda: model, images, CLASSES)


@pytest.fixture(scope="module")
def model():
    return literal.tiny_vit()


@pytest.fixture(scope="module")
def setting(model):
    return setting_of(model, coloured(12))


def normalised(setting):
    return setting.backbone.prepare(setting.train.images)


def without_prompt(backbone, images):
    return encode(backbone, torch.empty(1, 0, backbone.width), images)[0]


def moved(learner, scale=0.1):
    """Away from first values that are zero or one, which would hide a part that is left out."""
    source = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for own in learner.parameters:
            for value in own.values():
                value += scale * torch.randn(value.shape, generator=source)
    return learner


@pytest.mark.parametrize("method", METHODS, ids=identity)
class TestEveryMethod:
    def test_number_of_parameters(self, method, setting):
        learner = method.prepare(setting, CONFIGS).learner
        assert method.num_parameters(setting) == learner.num_parameters
        assert {len(own) for own in learner.parameters} == {len(learner.parameters[0])}

    def test_gradients_reach_what_is_trained_and_nothing_else(self, method, model, setting):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        learner = moved(method.prepare(setting, CONFIGS).learner)
        inputs = learner.prepare(setting.train.images)
        assert not inputs.requires_grad
        learner.backward(inputs, setting.train.labels, 3)
        for own in learner.parameters:
            for name, value in own.items():
                assert value.is_leaf
                assert value.dtype == torch.float32
                assert value.grad.abs().sum() > 0, name
        pointers = [value.data_ptr() for own in learner.parameters for value in own.values()]
        assert len(set(pointers)) == len(pointers)  # no two runs share a tensor
        frozen = [] if not hasattr(learner, "network") else list(learner.network.parameters())
        assert all(value.grad is None and not value.requires_grad for value in frozen)
        assert all(value.grad is None for value in model.parameters())
        torch.optim.SGD([v for own in learner.parameters for v in own.values()], lr=1.0).step()
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())

    def test_backward_is_the_gradient_of_the_mean_loss(self, method, setting):
        learner = moved(method.prepare(setting, CONFIGS).learner)
        inputs, labels = learner.prepare(setting.train.images), setting.train.labels
        logits = learner.logits(inputs, step=3)
        losses, correct = learner.backward(inputs, labels, 3)
        assert logits.shape == (len(CONFIGS), len(labels), CLASSES)
        for run, own in enumerate(learner.parameters):
            loss = cross_entropy(logits[run], labels)
            assert losses[run].item() == pytest.approx(len(labels) * loss.item(), rel=1e-5)
            assert correct[run] == (logits[run].argmax(1) == labels).sum()
            expected = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
            for value, gradient in zip(own.values(), expected, strict=True):
                # The same graph, summed by two calls: a few roundings of the largest element.
                assert (value.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7

    @pytest.mark.parametrize("step", [None, 5], ids=["evaluation", "training"])
    def test_shared_inputs_and_inputs_of_each_run_agree(self, method, setting, step):
        learner = moved(method.prepare(setting, CONFIGS).learner)
        inputs = learner.prepare(setting.train.images)
        shared = learner.logits(inputs, step=step)
        if step is None:
            source = torch.Generator().manual_seed(0)
            orders = torch.stack([torch.randperm(len(inputs), generator=source) for _ in CONFIGS])
        else:
            orders = torch.arange(len(inputs)).expand(3, -1)  # a dropout mask belongs to the place in a batch
        each = learner.logits(inputs[orders], step=step)
        chosen = torch.stack([row[order] for row, order in zip(shared, orders, strict=True)])
        torch.testing.assert_close(each, chosen, **CLOSE)

    def test_each_run_learns_from_its_own_inputs_and_labels(self, method, setting):
        """Runs with batches of their own against runs that see one batch each, alone."""
        learner = moved(method.prepare(setting, CONFIGS).learner)
        inputs = learner.prepare(setting.train.images)
        chosen = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [2, 11, 0, 7, 5]])
        learner.backward(inputs[chosen], setting.train.labels[chosen], 3)
        ours = [{name: value.grad.clone() for name, value in own.items()} for own in learner.parameters]
        for run, gradients in enumerate(ours):
            for value in learner.parameters[run].values():
                value.grad = None
            learner.backward(inputs[chosen[run]], setting.train.labels[chosen[run]], 3)
            for name, gradient in gradients.items():
                again = learner.parameters[run][name].grad
                # As above: a few roundings of the largest element.
                assert (again - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name

    def test_runs_do_not_meet(self, method, setting):
        """A run is the same alone as beside others; the first and the third, of one seed, are the same."""
        together, alone = method.prepare(setting, CONFIGS).learner, method.prepare(setting, CONFIGS[1:2]).learner
        with torch.no_grad():
            together.parameters[0]["head.weight"].fill_(float("nan"))
        inputs, labels = together.prepare(setting.train.images), setting.train.labels
        for _ in range(2):
            together.backward(inputs, labels, 3)
            alone.backward(inputs, labels, 3)
        logits = together.logits(inputs)
        torch.testing.assert_close(logits[1:2], alone.logits(inputs), **CLOSE)
        for name, value in alone.parameters[0].items():
            assert torch.equal(value, together.parameters[1][name])
            torch.testing.assert_close(together.parameters[1][name].grad, value.grad, rtol=1e-3, atol=1e-5)
        assert not torch.equal(logits[1], logits[2])

    def test_learns(self, method):
        images = coloured(40, size=32)
        setting = setting_of(mini_model(32), images)
        learner = method.prepare(setting, CONFIGS[:1]).learner
        trained = list(learner.parameters[0].values())
        optimizer: torch.optim.Optimizer
        if method.kind == "fine-tune":
            optimizer = torch.optim.AdamW(trained, lr=2e-3)
        else:
            optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        inputs = learner.prepare(images.images)
        accuracy = []
        for steps in (0, 10):
            for step in range(steps):
                optimizer.zero_grad()
                learner.backward(inputs, images.labels, step)
                optimizer.step()
            with torch.no_grad():
                right = learner.logits(inputs)[0].argmax(1) == images.labels
            accuracy.append(right.double().mean().item())
        assert accuracy[0] <= 0.5  # chance is 0.25; colours are so easy that a random head may tell two of them
        assert accuracy[1] > 0.75


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("method", [Linear(), Partial(2), Adapter(4, "vpt"), Bias()], ids=identity)
def test_features_before_training_are_those_of_encode(method, options):
    setting = setting_of(literal.tiny_vit(**options), coloured(6))
    learner = method.prepare(setting, CONFIGS).learner
    inputs = learner.prepare(setting.train.images)
    expected = without_prompt(setting.backbone, setting.train.images)
    head = learner.parameters[1]
    with torch.no_grad():
        logits = expected @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(learner.logits(inputs)[1], logits, **CLOSE)


def test_linear_is_nn_linear(setting):
    learner = moved(Linear().prepare(setting, CONFIGS).learner)
    features = without_prompt(setting.backbone, setting.train.images)
    assert learner.caches
    assert Linear().num_parameters(setting) == 0
    for own, logits in zip(learner.parameters, learner.logits(features), strict=True):
        torch.testing.assert_close(logits, nn.functional.linear(features, own["head.weight"], own["head.bias"]))


def sequential(learner, run):
    """The same MLP of torch's modules; dropout apart, whose masks are the learner's own."""
    own, statistics, width = learner.parameters[run], learner.buffers[run], learner.width
    layers = []
    for i in range(learner.hidden):
        hidden, norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        hidden.load_state_dict({k: own[f"hidden.{i}.{k}"].detach() for k in ("weight", "bias")})
        norm.load_state_dict(
            {k: own[f"hidden.{i}.norm.{k}"].detach() for k in ("weight", "bias")}
            | {k: statistics[f"hidden.{i}.{k}"] for k in ("running_mean", "running_var")},
            strict=False,
        )
        layers += [nn.Sequential(hidden, nn.ReLU(), norm)]
    last = nn.Linear(width, CLASSES)
    last.load_state_dict({k: own[f"head.{k}"].detach() for k in ("weight", "bias")})
    return nn.ModuleList([*layers, last])


@pytest.mark.parametrize("k", [2, 3])
def test_mlp_is_torch_modules(setting, k):
    learner = moved(MLP(k).prepare(setting, CONFIGS).learner)
    inputs = learner.prepare(setting.train.images)
    references = [sequential(learner, run) for run in range(len(CONFIGS))]
    for step in range(3):  # running statistics have a past
        logits = learner.logits(inputs, step=step)
        masks = learner._masks(len(inputs), step)
        for run, reference in enumerate(references):
            reference.train()
            x = inputs
            for i, layer in enumerate(reference[:-1]):
                x = layer(x) * masks[run, i]
            torch.testing.assert_close(logits[run], reference[-1](x), rtol=1e-4, atol=1e-4)
    for run, reference in enumerate(references):
        reference.eval()
        for i, layer in enumerate(reference[:-1]):
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(learner.buffers[run][f"hidden.{i}.{name}"], getattr(layer[2], name), **CLOSE)
        # rsqrt of small running variances magnifies the difference of two float32 roads.
        torch.testing.assert_close(learner.logits(inputs)[run], nn.Sequential(*reference)(inputs), rtol=1e-3, atol=1e-3)


def test_dropout_of_the_mlp(setting):
    learner = MLP(3).prepare(setting, CONFIGS).learner
    masks = learner._masks(2000, 7)
    assert masks.shape == (3, 2, 2000, setting.backbone.width)
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.9])
    # 192,000 draws with a chance of 0.1: the deviation of their mean is 0.0007.
    assert (masks == 0).double().mean().item() == pytest.approx(0.1, abs=0.004)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(learner._masks(2000, 7), masks)
    assert not torch.equal(learner._masks(2000, 8), masks)


def test_mlp_takes_a_single_image(setting):
    learner = MLP(3).prepare(setting, CONFIGS).learner
    before = copy.deepcopy(learner.buffers)
    losses, _ = learner.backward(learner.prepare(setting.train.images[:1]), setting.train.labels[:1], 0)
    assert losses.isfinite().all()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, learner.buffers, strict=True) for k in a)


def test_evaluation_leaves_the_mlps_statistics(setting):
    learner = MLP(3).prepare(setting, CONFIGS).learner
    before = copy.deepcopy(learner.buffers)
    learner.logits(learner.prepare(setting.train.images))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, learner.buffers, strict=True) for k in a)


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("k", [1, 2])
def test_partial_is_training_of_the_timm_model(options, k):
    model = literal.tiny_vit(**options)
    setting = setting_of(model, coloured(12))
    learner = Partial(k).prepare(setting, CONFIGS[:2]).learner
    inputs, labels = learner.prepare(setting.train.images), setting.train.labels
    ours = [value for own in learner.parameters for value in own.values()]
    optimizer = torch.optim.SGD(ours, lr=0.05, momentum=0.9)

    reference, head = copy.deepcopy(model).requires_grad_(False), nn.Linear(model.embed_dim, CLASSES)
    head.load_state_dict({k: learner.parameters[1][f"head.{k}"].detach() for k in ("weight", "bias")})
    parts = [*reference.blocks[-k:], reference.norm, reference.fc_norm, head]
    theirs = [p.requires_grad_() for part in parts for p in part.parameters()]
    literal_optimizer = torch.optim.SGD(theirs, lr=0.05, momentum=0.9)
    for step in range(2):
        optimizer.zero_grad()
        learner.backward(inputs, labels, step)
        optimizer.step()
        literal_optimizer.zero_grad()
        features = reference.forward_head(reference.forward_features(normalised(setting)), pre_logits=True)
        cross_entropy(head(features), labels).backward()
        literal_optimizer.step()
    named = dict(reference.named_parameters())
    assert learner.num_parameters == sum(p.numel() for p in theirs) - sum(p.numel() for p in head.parameters())
    for name, value in learner.parameters[1].items():
        expected = head.get_parameter(name[5:]) if name.startswith("head.") else named[name.removeprefix("model.")]
        # Two steps of float32 roads that differ in where the tokens were cut off the graph.
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_partial_counts_a_standard_block(model, setting):
    d, f = 16, 64
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    assert Partial(2).num_parameters(setting) == 2 * block + 2 * d


def test_biases(model, setting):
    learner = Bias().prepare(setting, CONFIGS).learner
    expected = {"patch_embed.proj.bias", "norm.bias", "head.weight", "head.bias"}
    for i in range(3):
        expected |= {
            f"blocks.{i}.{part}.bias" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        }
    assert set(learner.parameters[0]) == expected
    d, f = 16, 64
    assert learner.num_parameters == 3 * (d + 3 * d + d + d + f + d) + d + d


def test_biases_of_a_classifier_are_its_heads():
    setting = setting_of(literal.tiny_vit(num_classes=7), coloured(4))
    own = Bias().prepare(setting, CONFIGS).learner.parameters[0]
    assert own["head.bias"].shape == (CLASSES,)


def test_bias_is_training_of_the_timm_model(model, setting):
    learner = Bias().prepare(setting, CONFIGS[:2]).learner
    inputs, labels = learner.prepare(setting.train.images), setting.train.labels
    learner.backward(inputs, labels, 0)
    reference, own = copy.deepcopy(model), learner.parameters[1]
    logits = reference(normalised(setting)) @ own["head.weight"].detach().T + own["head.bias"].detach()
    cross_entropy(logits, labels).backward()
    for name, value in reference.named_parameters():
        if name.endswith(".bias"):
            scale = value.grad.abs().max()
            # A key's bias shifts a whole row of the softmax: its gradient is rounding alone, hence the floor.
            assert (own[name].grad - value.grad).abs().max() <= 1e-4 * scale + 1e-6, name


@pytest.mark.parametrize("options", list(NETWORKS.values())[:2], ids=list(NETWORKS)[:2])
def test_adapter_is_a_hook_behind_the_feed_forward_part(options):
    model = literal.tiny_vit(**options)
    setting = setting_of(model, coloured(6))
    learner = moved(Adapter(4).prepare(setting, CONFIGS).learner)
    own, reference = learner.parameters[1], copy.deepcopy(model)

    def hook(i):
        down, up = (
            [own[f"blocks.{i}.ls2.adapter.{part}.{k}"].detach() for k in ("weight", "bias")] for part in ("down", "up")
        )
        return lambda module, arguments, x: x + gelu(x @ down[0].T + down[1]) @ up[0].T + up[1]

    for i, block in enumerate(reference.blocks):
        block.ls2.register_forward_hook(hook(i))
    features = reference.forward_head(reference.forward_features(normalised(setting)), pre_logits=True)
    logits = features @ own["head.weight"].T + own["head.bias"]
    torch.testing.assert_close(learner.logits(learner.prepare(setting.train.images))[1], logits, **CLOSE)


def test_first_values_of_the_adapter(setting):
    own = [Adapter(2, init).prepare(setting, CONFIGS).learner.parameters for init in ("houlsby", "vpt")]
    for name, value in own[0][0].items():
        if name.endswith(("adapter.down.weight", "adapter.up.weight")):
            # 128 draws of a normal cut at two deviations, whose deviation is 0.88 σ.
            assert value.std().item() == pytest.approx(0.88 * HOULSBY_STD, rel=0.3)
            assert value.abs().max() <= 2 * HOULSBY_STD
            assert not torch.equal(value, own[0][1][name])
        elif not name.startswith("head"):
            assert not value.any()
    assert not any(value.any() for name, value in own[1][0].items() if not name.startswith("head"))


def test_only_the_upper_bias_of_vpts_adapter_ever_moves(setting):
    learner = Adapter(4, "vpt").prepare(setting, CONFIGS[:1]).learner
    own = learner.parameters[0]
    optimizer = torch.optim.AdamW(list(own.values()), lr=0.01, weight_decay=0.01)
    inputs = learner.prepare(setting.train.images)
    for step in range(3):
        optimizer.zero_grad()
        learner.backward(inputs, setting.train.labels, step)
        optimizer.step()
    assert all(value.any() == (name.endswith("up.bias") or name.startswith("head")) for name, value in own.items())


def test_sidetune_mixes_the_two_networks(setting):
    learner = moved(SideTune().prepare(setting, CONFIGS).learner)
    own, images = learner.parameters[1], normalised(setting)
    x = images
    for i in (0, 3, 6, 9):
        x = nn.functional.conv2d(x, own[f"side.{i}.weight"], stride=2, padding=1)
        x = nn.functional.group_norm(x, 8, own[f"side.{i + 1}.weight"], own[f"side.{i + 1}.bias"]).relu()
    side = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1) @ own["side.14.weight"].T
    share = torch.sigmoid(own["mix"])
    mixed = share * without_prompt(setting.backbone, setting.train.images) + (1 - share) * side
    logits = mixed @ own["head.weight"].T + own["head.bias"]
    torch.testing.assert_close(learner.logits(learner.prepare(setting.train.images))[1], logits, **CLOSE)


def test_sidetune_starts_with_equal_shares(setting):
    learner = SideTune().prepare(setting, CONFIGS).learner
    assert [own["mix"].item() for own in learner.parameters] == [0.0, 0.0, 0.0]
    first, second, third = (own["side.0.weight"] for own in learner.parameters)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [(16, 16), (64, 40)], ids=str)
def test_sidetune_takes_any_image_size(size):
    model = literal.tiny_vit(img_size=size)
    source = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8, generator=source)
    setting = setting_of(model, LabelledImages("noise", images, torch.arange(4)))
    learner = SideTune().prepare(setting, CONFIGS).learner
    assert learner.logits(learner.prepare(images)).shape == (3, 4, CLASSES)
    assert learner.num_parameters == SideTune().num_parameters(setting)


@pytest.mark.parametrize("method", METHODS, ids=identity)
def test_the_global_generator_is_left_alone(method, setting):
    before = torch.get_rng_state()
    learner = method.prepare(setting, CONFIGS).learner
    learner.backward(learner.prepare(setting.train.images), setting.train.labels, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_refuses(setting):
    with pytest.raises(OptionError, match="at least 2 layers"):
        MLP(1)
    with pytest.raises(OptionError, match="1 to 3 blocks"):
        Partial(4).prepare(setting, CONFIGS)
    with pytest.raises(OptionError, match="k ≥ 1, got 0"):
        Partial(0)
    with pytest.raises(OptionError, match="width 16"):
        Adapter(17).prepare(setting, CONFIGS)
    with pytest.raises(OptionError, match="at least 1"):
        Adapter(0)
    with pytest.raises(OptionError, match="'houlsby' or 'vpt'"):
        Adapter(8, "zero")
