"""Prompt methods: by hand where a formula says what must come out, by autograd where parts must fit, by learning."""

from __future__ import annotations

import dataclasses
import math

import literal
import pytest
import torch
from sklearn.covariance import LedoitWolf

from hgprompt import FrozenViT, OptionError, PromptError, PromptPool, encode, fast_ensemble, h_score
from hgprompt.data import LabelledImages
from hgprompt.encoder import MicroBatch
from hgprompt.tuning import TuneConfig, random_prompt, train, tune
from hgprompt.tuning import prompts as prompt_learner
from hgprompt.tuning.learner import HEAD, cross_entropies
from hgprompt.tuning.method import Cost, Setting
from hgprompt.tuning.methods import CONTROLS, METHODS, attempt, controls, panda, spot
from hgprompt.tuning.methods.controls import BestSingle, EqualCompute, RandomWeights, WeightLearner
from hgprompt.tuning.methods.hgprompt import BestSingleByH, HGPrompt, PaperHGPrompt, RawHGPrompt
from hgprompt.tuning.methods.start import brief_config, early_prompt
from hgprompt.tuning.streams import stream

PROMPTS = {name: METHODS[name] for name in ("VPT", "VPT-deep", "SPoT", "ATTEMPT", "PANDA", "HGPrompt")}
PROMPTS |= {name: control for name, control in CONTROLS.items() if control.kind == "prompt"}
del PROMPTS["HGPrompt, paper"]  # its start is a thousand steps away, and is held against fast_ensemble below
TOKENS, SOURCES = 2, 3


@pytest.fixture(scope="module")
def model():
    return literal.tiny_vit()


def _setting(model, *, deep=False, n=24, dtype=None):
    vit = FrozenViT.from_timm(model, dtype=dtype)
    prompts = {f"p{i}": random_prompt(vit, TOKENS, deep=deep, seed=10 + i) * (i + 1) for i in range(SOURCES)}
    pool = PromptPool(prompts, backbone=vit.info)
    return Setting(vit, lambda: model, _images(n), 3, TOKENS, deep, pool)


def _images(n, seed=0):
    """Classes that differ in brightness: easy, and chance is a third."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 60, (n, 3, 16, 16), generator=g)
    return LabelledImages("set", (noise + 90 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


CONFIG = TuneConfig(epochs=20, batch_size=8, lr=4.0, head_lr=8.0, weight_decay=0.0, seed=5)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("name", PROMPTS)
def test_learns_what_its_formula_counts(model, name, deep):
    setting, method = _setting(model, deep=deep), PROMPTS[name]
    configs = [dataclasses.replace(CONFIG, epochs=8 if deep else 20, seed=seed) for seed in (5, 6)]
    prepared = method.prepare(setting, configs)
    learner = prepared.learner
    before = [{name: value.detach().clone() for name, value in p.items()} for p in learner.parameters]
    trained = train(learner, prepared.configs or configs, setting.train)
    if not deep:
        assert min(trained.history[-1]["train_accuracy"]) > 0.8
    easy = learner.head == "fitted"  # which leaves next to nothing to learn of such a task
    if easy:
        assert min(trained.history[0]["train_accuracy"]) > 0.8
    else:
        assert trained.history[-1]["loss"][0] < trained.history[0]["loss"][0]
    counted = 0
    for name_, value in learner.parameters[0].items():
        assert value.dtype == torch.float32
        assert value.grad is not None
        assert value.grad.any() if easy else not torch.equal(value, before[0][name_])
        counted += 0 if name_.startswith(HEAD) else value.grad.numel()
    assert counted == learner.num_parameters == method.num_parameters(setting)
    # Seeds start apart: at least in the head.
    assert not torch.equal(before[0]["head.weight"], before[1]["head.weight"])


def test_parameters_by_hand(model):
    for deep in (False, True):
        setting = _setting(model, deep=deep)
        for name, method in PROMPTS.items():
            prompt = (3 if deep or name == "VPT-deep" else 1) * 2 * 16
            attention = 16 * 100 + 100 * 16 + 16 + 16 if name == "ATTEMPT" else 0
            assert method.num_parameters(setting) == prompt + attention


def test_vpt_deep_is_vpt_in_a_deep_setting_with_its_dropout(model):
    dropped = [dataclasses.replace(CONFIG, epochs=2, prompt_dropout=0.1)]
    trained = []
    for deep, name, configs in ((False, "VPT-deep", [dataclasses.replace(CONFIG, epochs=2)]), (True, "VPT", dropped)):
        setting = _setting(model, deep=deep)
        prepared = METHODS[name].prepare(setting, configs)
        assert [config.prompt_dropout for config in prepared.configs or configs] == [0.1]
        train(prepared.learner, prepared.configs or configs, setting.train)
        trained.append(prepared.learner.parameters[0]["prompt"])
    assert trained[0].shape == (3, TOKENS, 16)
    assert torch.equal(*trained)  # the same work in the same order


# SPoT -----------------------------------------------------------------------------------------------------------------


def test_spot_by_hand():
    # Average tokens (1, 0), (0, 1) and (-1, -1), the target's is (3, 4): cosines 3/5, 4/5 and -7/(5√2).
    prompts = torch.tensor([[[2.0, 1], [0, -1]], [[0, 1], [0, 1]], [[-1, -1], [-1, -1]]])
    target = torch.tensor([[3.0, 4], [3, 4]])
    found = spot.similarities(prompts, target)
    assert found.tolist() == pytest.approx([0.6, 0.8, -7 / (5 * math.sqrt(2))])
    assert spot.top_weights(found, 1).tolist() == [0, 1, 0]
    assert spot.top_weights(found, 2).tolist() == pytest.approx([3 / 7, 4 / 7, 0])
    assert spot.top_weights(found, 3).tolist() == pytest.approx([3 / 7, 4 / 7, 0])
    assert spot.top_weights(-found.abs(), 2).tolist() == [1, 0, 0]
    # Pairs: each of the first prompt's two tokens with the target's: (2·3 + 1·4)/(5√5) and -4/5.
    pairs = spot.similarities(prompts, target, "pairs")
    assert float(pairs[0]) == pytest.approx((10 / (5 * math.sqrt(5)) - 0.8) / 2)
    # Deep: layers side by side, as one wide token.
    deep = prompts[:, :, None].movedim(2, 1).expand(3, 2, 2, 2)
    assert spot.similarities(deep, target.expand(2, 2, 2)).tolist() == pytest.approx(found.tolist())


def test_spot_starts_from_the_most_similar(model):
    setting = _setting(model)
    prepared = spot.SPoT().prepare(setting, [CONFIG])
    report = prepared.report["seed 5"]
    best = max(report["similarities"], key=report["similarities"].get)
    assert torch.equal(prepared.learner.parameters[0]["prompt"].detach(), setting.pool[best])
    assert prepared.cost == Cost(backward=2 * 24)
    # The target itself, as an early prompt, is more like itself than anything else.
    early = spot.early_prompt(setting, 5, 2)[0]
    pool = PromptPool({**setting.pool, "itself": early}, backbone=setting.backbone.info)
    report = spot.SPoT().prepare(dataclasses.replace(setting, pool=pool), [CONFIG]).report["seed 5"]
    assert report["weights"]["itself"] == 1


@pytest.mark.parametrize("name", ["uniform", "ATTEMPT", "α by cross-entropy"])
def test_one_micro_batch_serves_all_steps(model, name, monkeypatch):
    """What a GPU had no memory for is not tried again at every step."""
    seen = []

    def spied(original):
        def spy(*arguments, micro_batch=None, **options):
            seen.append(micro_batch)
            return original(*arguments, micro_batch=micro_batch, **options)

        return spy

    for module in (attempt, controls, prompt_learner):
        for function in ("encode", "pull_back", "pull_back_runs"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, spied(getattr(module, function)))
    config = dataclasses.replace(CONFIG, epochs=2)
    prepared = PROMPTS[name].prepare(_setting(model), [config])
    if name != "α by cross-entropy":  # which trains its α while it prepares
        train(prepared.learner, prepared.configs or [config], _images(24))
    assert len(seen) > 2
    assert isinstance(seen[0], MicroBatch)
    assert all(one is seen[0] for one in seen)


# ATTEMPT --------------------------------------------------------------------------------------------------------------


def test_attempt_attention_by_hand():
    # W_down and W_up reach one hidden number: SiLU(x₁ + x₂) = s, h = LayerNorm(s·(1, -1)) = ±(1, -1) nearly.
    own = {
        "prompt": torch.tensor([[0.0, -5], [-1, 2]]),  # key (0, 2)
        "attention.down": torch.tensor([[1.0, 1.0]]),
        "attention.up": torch.tensor([[1.0], [-1.0]]),
        "attention.norm.weight": torch.tensor([2.0, 1.0]),
        "attention.norm.bias": torch.tensor([0.0, 1.0]),
    }
    keys = attempt.prompt_keys(torch.tensor([[[1.0, 0], [3, -1]], [[-2, -2], [-3, 4]]]))
    assert keys.tolist() == [[3, 0], [-2, 4]]
    found = attempt.attention(torch.tensor([[1.0, 2.0]]), keys, own)
    # h = (2, -1 + 1): scores 6, -4, 0 at T = 2e. LayerNorm's epsilon shows in the sixth digit.
    scores = [math.exp(v / (2 * math.e)) for v in (6, -4, 0)]
    assert found[0].tolist() == pytest.approx([v / sum(scores) for v in scores], rel=1e-5)


@pytest.mark.parametrize("own_images", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_attempt_is_the_literal_network(model, deep, own_images):
    """Image by image with timm's modules, gradients by autograd."""
    exact = literal.tiny_vit().double()
    setting = _setting(exact, deep=deep)
    configs = [CONFIG, dataclasses.replace(CONFIG, seed=6)]
    learner = METHODS["ATTEMPT"].prepare(setting, configs).learner
    pixels, labels = setting.train[:4]
    inputs = torch.stack([pixels, setting.train.images[4:8]]) if own_images else pixels
    labels = torch.stack([labels, setting.train.labels[4:8]]) if own_images else labels
    losses, correct = learner.backward(inputs, labels, 0)
    for r, own in enumerate(learner.parameters):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
        images = inputs[r] if own_images else inputs
        normal = setting.backbone.prepare(images)
        with torch.no_grad():
            tokens = exact._pos_embed(exact.patch_embed(normal))[:, 1:]
        a = attempt.attention(tokens.float().amax(1), attempt.prompt_keys(setting.pool.stack()), leaves)
        every = [*setting.pool.values(), leaves["prompt"]]
        logits = []
        for b in range(4):
            prompt = sum(a[b, j] * every[j] for j in range(SOURCES + 1)) + leaves["prompt"]
            feature = literal.features(exact, prompt[None].double(), normal[b : b + 1])[0]
            logits.append(feature.float() @ leaves["head.weight"].T + leaves["head.bias"])
        logits = torch.cat(logits)
        loss = torch.nn.functional.cross_entropy(logits, labels[r] if own_images else labels)
        loss.backward()
        # Sums in float32 around a float64 network.
        assert float(losses[r]) == pytest.approx(4 * float(loss.detach()), rel=1e-5)
        torch.testing.assert_close(learner.logits(inputs)[r], logits, rtol=1e-4, atol=1e-5)
        for name, value in leaves.items():
            torch.testing.assert_close(own[name].grad, value.grad, rtol=1e-3, atol=1e-6)
    assert correct.tolist() == (learner.logits(inputs).argmax(2) == labels).sum(1).tolist()


def test_attempt_warms_up_for_500_steps_or_a_third(model):
    setting = _setting(model)
    for epochs, warmup in ((20, 1 / 3), (1000, 500 / 3000)):
        configs = [dataclasses.replace(CONFIG, epochs=epochs)]
        prepared = METHODS["ATTEMPT"].prepare(setting, configs)
        assert prepared.configs[0].warmup == pytest.approx(warmup)
        assert torch.equal(prepared.learner.parameters[0]["prompt"].detach(), setting.pool["p0"])


# PANDA ----------------------------------------------------------------------------------------------------------------


def test_panda_loss_by_hand():
    student, teacher = torch.tensor([[[1.0, 2], [0, 0]]]), torch.tensor([[[0.0, 4], [0, 2]]])
    # Image by image: (1 + 4)/2 and (0 + 4)/2, times λw.
    assert panda.distillation(student, teacher, torch.tensor([0.5])).tolist() == [0.5 * (2.5 + 2.0)]


def test_panda_is_cross_entropy_and_distance(model):
    exact = literal.tiny_vit().double()
    setting = _setting(exact)
    configs = [dataclasses.replace(CONFIG, epochs=2, seed=seed) for seed in (5, 6)]
    prepared = panda.PANDA(lam=0.7).prepare(setting, configs)
    learner = prepared.learner
    images, labels = setting.train[:5]
    losses, _ = learner.backward(images, labels, 0)
    grads = [{name: value.grad.clone() for name, value in p.items()} for p in learner.parameters]
    with torch.no_grad():
        taught = learner.teacher.logits(images)
    assert not any(p["prompt"].grad is None for p in learner.parameters)
    for r, seed in enumerate((5, 6)):
        w = prepared.report[f"seed {seed}"]["transferability"]
        assert 0 <= w <= 1
        assert float(learner.strengths[r]) == pytest.approx(0.7 * w)
        logits = learner.logits(images)
        each = cross_entropies(logits, labels)[0][r]
        distance = sum(((logits[r, b] - taught[r, b]) ** 2).mean().item() for b in range(5))
        assert float(losses[r]) == pytest.approx(each.item() + 0.7 * w * distance, rel=1e-4)
        total = (each + learner.strengths[r] * (logits[r] - taught[r]).square().mean(1).sum()) / 5
        own = learner.parameters[r]
        for name, slope in zip(own, torch.autograd.grad(total, list(own.values())), strict=True):
            torch.testing.assert_close(grads[r][name], slope, rtol=1e-3, atol=1e-6)  # float32 around float64
    # The teacher started from the sources' mean and has been tuned; nothing of it is trained any more.
    tuned = learner.teacher.parameters[0]["prompt"].detach()
    assert not torch.equal(tuned, setting.pool.stack().mean(0))
    assert prepared.cost == Cost(forward=2 * 3 * 24 + 2 * 2 * 24, backward=2 * 2 * 24 + 2 * 2 * 24)


def test_transferability_is_the_cosine_of_mean_shifts(model):
    exact = literal.tiny_vit().double()
    setting = _setting(exact)
    a, b = setting.pool["p0"], setting.pool["p2"]
    normal = setting.backbone.prepare(setting.train.images)
    with torch.no_grad():
        plain = exact(normal)
        shifts = [(literal.features(exact, p[None].double(), normal)[0] - plain).mean(0) for p in (a, b)]
    expected = max(0.0, float(shifts[0] @ shifts[1] / (shifts[0].norm() * shifts[1].norm())))
    assert panda.transferability(setting, a, b) == pytest.approx(expected, rel=1e-9)
    assert panda.transferability(setting, a, a) == pytest.approx(1)


# HGPrompt and the controls --------------------------------------------------------------------------------------------


def test_hgprompt_is_fast_ensembles_mixture(model):
    setting = _setting(model)
    for lam in (1.0, 0.0):
        method = HGPrompt(lam)
        prepared = method.prepare(setting, [CONFIG])
        found = fast_ensemble(
            setting.pool, setting.train.batches(64), backbone=setting.backbone, lam=lam, seed=5,
            gradient_images=256 if lam else 0,
        )  # fmt: skip
        assert torch.equal(prepared.learner.parameters[0]["prompt"].detach(), found.prompt.float())
        assert prepared.cost == Cost(forward=24 * 3, backward=24 * 3 if lam else 0)
    assert HGPrompt(0.0).name == "HGPrompt λ=0"


def test_hgprompt_with_the_papers_lambda(model):
    """-H + λ L is C - 1 times -H/(C-1) + λ/(C-1) L: the minimum is the same."""
    setting = _setting(model)
    raw = RawHGPrompt(0.5)
    ours = HGPrompt(0.5 / (setting.num_classes - 1)).start(setting, 0).report["weights"]
    papers = raw.start(setting, 0).report["weights"]
    assert papers == pytest.approx(ours, abs=1e-3)  # both stop at a gap of 1e-6
    assert papers != pytest.approx(HGPrompt(0.5).start(setting, 0).report["weights"], abs=1e-3)
    assert raw.name == "HGPrompt, raw H λ=0.5"


def test_hgprompt_to_the_letter(model, monkeypatch):
    assert PaperHGPrompt.options == {"preset": "paper"}
    options = {"preset": "paper", "max_steps": 20}  # of a thousand
    monkeypatch.setattr(PaperHGPrompt, "options", options)
    setting = _setting(model)
    start = CONTROLS["HGPrompt, paper"].start(setting, 5)
    found = fast_ensemble(setting.pool, setting.train.batches(64), backbone=setting.backbone, seed=5, **options)
    assert torch.equal(start.prompt, found.prompt)
    assert found.shrinkage_intensity == 0
    assert start.cost == Cost(forward=24 * 3, backward=24 * 3)


def test_random_weights_are_uniform_on_the_simplex(model):
    setting = _setting(model)
    drawn = []
    for seed in range(300):
        _, _, report = RandomWeights().start(setting, seed)
        drawn.append(list(report["weights"].values()))
    drawn = torch.tensor(drawn, dtype=torch.float64)
    torch.testing.assert_close(drawn.sum(1), torch.ones(300, dtype=torch.float64))
    # Dirichlet(1) over 3: mean 1/3, variance 1/18 = 0.056; four standard errors of 300 draws.
    torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3).double(), rtol=0, atol=4 * (1 / 18 / 300) ** 0.5)
    torch.testing.assert_close(drawn.var(0), torch.full((3,), 1 / 18).double(), rtol=0, atol=0.02)


def test_best_single_is_the_source_that_learns(model):
    setting = dataclasses.replace(_setting(model), train=_images(60))
    order = torch.randperm(60, generator=stream(5, "held out"))
    held_out, rest = setting.train.subset(order[:12]), setting.train.subset(order[12:])
    # Each source tuned by itself.
    alone = {
        name: tune(setting.backbone, {name: prompt}, rest, test=held_out, config=brief_config(3, 5)).accuracy(name)
        for name, prompt in setting.pool.items()
    }
    assert len(set(alone.values())) > 1
    start, cost, report = BestSingle(epochs=3).start(setting, 5)
    assert report["accuracies"] == alone
    assert report["source"] == max(alone, key=alone.get)
    assert torch.equal(start, setting.pool[report["source"]])
    assert cost == Cost(forward=12 * 3, backward=3 * 48 * 3)


def test_best_single_by_h_has_the_highest_h_of_all(model):
    setting = _setting(model)
    start, cost, report = BestSingleByH().start(setting, 5)
    features = encode(setting.backbone, setting.pool.stack(), setting.train.images)
    mean = features.double().mean(0).numpy()
    intensity = LedoitWolf().fit(mean - mean.mean(0)).shrinkage_  # one for all, that of the uniform mixture
    scores = [float(h_score(f, setting.train.labels, shrinkage=intensity)) for f in features]
    # Float32 features, in batches of another size.
    assert list(report["source_h_scores"].values()) == pytest.approx(scores, rel=1e-3)
    assert report["source"] == setting.pool.names[scores.index(max(scores))]
    assert torch.equal(start, setting.pool[report["source"]])
    assert cost == Cost(forward=len(setting.train) * 3)


@pytest.mark.parametrize(
    ("seeds", "start"), [((3, 3, 3), 3), ((3, 3, 4), 5), ((3, None, 3), 5), ((2**70,) * 3, 5), (([3],) * 3, 5)], ids=str
)
def test_an_early_prompt_starts_where_all_sources_did(model, seeds, start):
    setting = _setting(model)
    records = {name: {"init_seed": seed} for name, seed in zip(setting.pool, seeds, strict=True)}
    pool = PromptPool(dict(setting.pool), backbone=setting.pool.backbone, metadata=records)
    early, _ = early_prompt(dataclasses.replace(setting, pool=pool), 5, 1)
    begun = random_prompt(setting.backbone, TOKENS, seed=start)
    tuned = tune(setting.backbone, {"early": begun}, setting.train, config=brief_config(1, 5)).prompt("early")
    # The same sums in another blocking.
    torch.testing.assert_close(early, tuned, rtol=1e-4, atol=1e-5)


def test_equal_compute_adds_what_alpha_costs(model):
    setting = _setting(model)
    prepared = EqualCompute().prepare(setting, [CONFIG])
    # 72 images × prompts forward and as many there and back, on 24 images: 3 epochs and 3/(1 + 47.6/44.2).
    assert prepared.configs[0].epochs == CONFIG.epochs + math.ceil(3 + 3 / (1 + 47.6 / 44.2))


def test_weights_by_cross_entropy_have_its_gradient():
    exact = literal.tiny_vit().double()
    setting = _setting(exact)
    head = {"head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)}
    own = {name: value.requires_grad_() for name, value in (head | {"weights": torch.tensor([0.3, -0.2, 0.1])}).items()}
    learner = WeightLearner(setting.backbone, setting.pool.stack(), [own])
    images, labels = setting.train[:6]
    learner.backward(images, labels, 0)
    grads = {name: value.grad.clone() for name, value in own.items()}
    alpha = own["weights"].softmax(0)
    prompt = sum(alpha[i] * p for i, p in enumerate(setting.pool.values()))
    features = encode(setting.backbone, prompt[None], images)[0].float()
    loss = torch.nn.functional.cross_entropy(features @ own["head.weight"].T + own["head.bias"], labels)
    for name, slope in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
        torch.testing.assert_close(grads[name], slope, rtol=1e-4, atol=1e-6)  # float32 around a float64 network


def test_refuses_pools_that_do_not_fit(model):
    setting = _setting(model)
    for method in PROMPTS.values():
        if not method.uses_pool:
            continue
        with pytest.raises(PromptError, match="give the setting a pool"):
            method.prepare(dataclasses.replace(setting, pool=None), [CONFIG])
        with pytest.raises(PromptError, match="pool's prompts are"):
            method.prepare(dataclasses.replace(setting, num_tokens=5), [CONFIG])
    for make in (lambda: HGPrompt(-1.0), lambda: panda.PANDA(-1.0), lambda: spot.SPoT(0), lambda: BestSingle(0)):
        with pytest.raises(OptionError):
            make()


def test_table_is_in_the_papers_order():
    prompts = [name for name in METHODS if name in PROMPTS]
    assert prompts == ["VPT", "VPT-deep", "SPoT", "ATTEMPT", "PANDA", "HGPrompt"]
    assert list(METHODS)[-6:] == prompts
