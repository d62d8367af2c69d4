"""fast_ensemble against the paper taken literally, and its behaviour as a guest in somebody else's program."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import literal
import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import hgprompt
from hgprompt.backbone import FrozenViT
from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import BackboneError, DataError, HGPromptError, HGPromptWarning, OptionError, PromptError
from hgprompt.pool import BackboneInfo, PromptPool
from hgprompt.result import EnsembleResult
from hgprompt.sample import folds_of

N, C, M, P = 48, 3, 4, 3
NAMES = ("a", "b", "c", "d")


def _task(dtype=torch.float64, n=N, seed=0, size=16):
    """Images whose class shows in their colours, unevenly."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (n,), generator=g)
    labels[:C] = torch.arange(C)
    colours = torch.randn(C, 3, 1, 1, generator=g, dtype=torch.float64)
    images = torch.randn(n, 3, size, size, generator=g, dtype=torch.float64) + 0.8 * colours[labels]
    return images.to(dtype), labels


def _prompts(deep=False, dtype=torch.float64, m=M):
    g = torch.Generator().manual_seed(5)
    return torch.randn((m, 3, P, 16) if deep else (m, P, 16), generator=g, dtype=torch.float64).to(dtype)


def _batches(images, labels, size=10):
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(images), size)]


def _intensity(features):
    """Ledoit–Wolf on the uniform mixture, by definition."""
    f = features.mean(0).numpy()
    f = f - f.mean(0)
    n, h = f.shape
    s = f.T @ f / n
    spread = sum(np.linalg.norm(np.outer(x, x) - s) ** 2 for x in f) / n**2
    return spread / np.linalg.norm(s - np.trace(s) / h * np.eye(h)) ** 2


def _literal_gradients(model, prompts, images, labels, intensity, folds, head="shared-lda"):
    """Eq. 8 with LDA heads, every image scored by a head fitted on the other folds, at each prompt's temperature."""
    gradients = []
    fold = folds_of(np.arange(len(images)), folds)
    mixture = literal.features(model, prompts, images).detach().mean(0)
    for prompt in prompts:
        leaf = prompt.clone().requires_grad_()
        features = literal.features(model, leaf[None], images)[0]
        fit = mixture if head == "shared-lda" else features.detach()
        logits = torch.stack(
            [
                literal.lda_logits(fit[fold != k], labels[fold != k], features[i : i + 1], intensity)[0]
                for i, k in enumerate(fold.tolist())
            ]
        )
        factor = literal.temperature(logits.detach(), labels)
        loss = torch.nn.functional.cross_entropy(factor * logits, labels)
        gradients.append(torch.autograd.grad(loss, leaf)[0].numpy())
    return np.stack(gradients)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_equals_the_paper_taken_literally(deep, lam):
    model = literal.tiny_vit().double()
    images, labels = _task()
    prompts = _prompts(deep)
    folds = 4
    result = fast_ensemble(
        dict(zip(NAMES, prompts, strict=True)), _batches(images, labels), backbone=model, lam=lam, folds=folds
    )
    with torch.no_grad():
        features = literal.features(model, prompts, images)
    intensity = _intensity(features)
    gradients = _literal_gradients(model, prompts, images, labels, intensity, folds)

    def objective(weights):
        mixed = np.tensordot(weights, features.numpy(), axes=1)
        h = literal.h_score(mixed, labels.numpy(), intensity)
        return -h / (C - 1) + lam * literal.alignment_loss(gradients, weights)

    weights = result.weights.numpy()
    assert result.shrinkage_intensity == pytest.approx(intensity, rel=1e-6)
    h = literal.h_score(np.tensordot(weights, features.numpy(), axes=1), labels.numpy(), intensity)
    assert result.h_score == pytest.approx(h, abs=1e-6)
    assert result.alignment_loss == pytest.approx(literal.alignment_loss(gradients, weights), abs=1e-6)
    unit = gradients.reshape(M, -1) / np.linalg.norm(gradients.reshape(M, -1), axis=1, keepdims=True)
    np.testing.assert_allclose(result.gradient_cosines, unit @ unit.T, atol=1e-6)
    assert result.objective == pytest.approx(objective(weights), abs=1e-6)
    for i in range(M):
        expected = literal.h_score(features[i].numpy(), labels.numpy(), intensity)
        assert float(result.source_h_scores[i]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(result.prompt, torch.tensordot(result.weights, prompts, dims=1), rtol=1e-6, atol=1e-6)
    best = min(
        minimize(
            objective, start, method="SLSQP", bounds=[(0, 1)] * M, options={"ftol": 1e-12, "maxiter": 200},
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        ).fun
        for start in np.random.default_rng(0).dirichlet(np.ones(M), size=10)
    )  # fmt: skip
    assert result.objective <= best + 1e-6


def test_float32_streaming_equals_literal_float64():
    model = literal.tiny_vit()
    images, labels = _task(torch.float32)
    prompts = _prompts(dtype=torch.float32)
    result = fast_ensemble(prompts, _batches(images, labels, 7), backbone=model)
    exact = fast_ensemble(prompts.double(), [(images.double(), labels)], backbone=copy.deepcopy(model).double())
    # Float32 features carry 1e-7 relative errors; H is smooth in them.
    assert result.h_score == pytest.approx(exact.h_score, rel=1e-5)
    torch.testing.assert_close(result.gradient_cosines, exact.gradient_cosines, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.weights, exact.weights, rtol=0, atol=1e-3)  # argmin of a flat function


@pytest.mark.parametrize("keep", ["features", "moments"])
def test_batch_size_and_representation_do_not_matter(keep):
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    reference = fast_ensemble(prompts, [(images, labels)], backbone=model, gradient_images=None)
    for size in (1, 5, 17):
        other = fast_ensemble(prompts, _batches(images, labels, size), backbone=model, keep=keep, micro_batch=size)
        torch.testing.assert_close(other.weights, reference.weights, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.weight_std, reference.weight_std, rtol=0, atol=1e-4)
        assert other.h_score == pytest.approx(reference.h_score, rel=1e-8)


def test_sorted_loader_gives_the_same_answer():
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    order = labels.argsort(stable=True)
    plain = fast_ensemble(prompts, _batches(images, labels), backbone=model, folds=1)
    by_class = fast_ensemble(prompts, _batches(images[order], labels[order]), backbone=model, folds=1)
    torch.testing.assert_close(by_class.weights, plain.weights, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_class.gradient_cosines, plain.gradient_cosines, rtol=0, atol=1e-8)


def test_loader_is_read_once_and_may_be_a_generator():
    model, (images, labels), prompts = literal.tiny_vit(), _task(torch.float32), _prompts(dtype=torch.float32)
    reads = []

    class Loader:
        def __iter__(self):
            reads.append(1)
            return iter(_batches(images, labels))

    listed = fast_ensemble(prompts, Loader(), backbone=model)
    streamed = fast_ensemble(prompts, (b for b in _batches(images, labels)), backbone=model)
    assert reads == [1]
    assert torch.equal(listed.weights, streamed.weights)


def test_same_input_same_bits():
    model, (images, labels), prompts = (
        literal.tiny_vit(),
        _task(torch.float32, n=80),
        _prompts(dtype=torch.float32),
    )
    first, again = (
        fast_ensemble(prompts, _batches(images, labels), backbone=model, gradient_images=20) for _ in range(2)
    )
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.weight_std, again.weight_std)
    assert torch.equal(first.gradient_cosines, again.gradient_cosines)
    assert first.n_gradient_images == 20


def test_own_head_is_applied_in_the_pass():
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    head = torch.nn.Linear(16, C).double()
    for given in (head, [head] * M, torch.nn.ModuleList([head] * M), lambda f: head(f)):
        result = fast_ensemble(prompts, _batches(images, labels), backbone=model, head=given)
        leaf = prompts.clone().requires_grad_()
        features = literal.features(model, leaf, images)
        loss = sum(torch.nn.functional.cross_entropy(head(f), labels) for f in features)
        (gradients,) = torch.autograd.grad(loss, leaf)
        unit = torch.nn.functional.normalize(gradients.flatten(1))
        torch.testing.assert_close(result.gradient_cosines, unit @ unit.T, rtol=1e-8, atol=1e-8)
        assert result.n_gradient_images == N
    assert all(p.grad is None for p in head.parameters())


@pytest.mark.parametrize("head", ["lda", "shared-lda", "centroid"])
def test_closed_form_heads(head):
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    result = fast_ensemble(prompts, _batches(images, labels), backbone=model, head=head, folds=3)
    with torch.no_grad():
        intensity = _intensity(literal.features(model, prompts, images))
    if head == "centroid":
        intensity = 1.0
    gradients = _literal_gradients(model, prompts, images, labels, intensity, 3, head)
    unit = gradients.reshape(M, -1) / np.linalg.norm(gradients.reshape(M, -1), axis=1, keepdims=True)
    np.testing.assert_allclose(result.gradient_cosines, unit @ unit.T, atol=1e-6)


def test_paper_preset_is_algorithm_1():
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    batches = _batches(images, labels)
    result = fast_ensemble(prompts, batches, backbone=model, preset="paper", folds=4, max_steps=200, keep_problem=True)
    assert torch.equal(result.problem.solve(1.0).weights, result.weights)  # what is asked afterwards has its solver
    with torch.no_grad():
        features = literal.features(model, prompts, images).numpy()
    gradients = _literal_gradients(model, prompts, images, labels, _intensity(torch.from_numpy(features)), folds=4)

    def loss(weights):
        h = literal.h_score(np.tensordot(weights, features, axes=1), labels.numpy())
        return -h + literal.alignment_loss(gradients, weights)

    weights = np.full(M, 1 / M)
    for _ in range(200):
        step = 1e-6
        slope = [(loss(weights + step * e) - loss(weights - step * e)) / (2 * step) for e in np.eye(M)]
        moved = weights - 0.005 * np.array(slope)
        ordered = np.sort(moved)[::-1]
        k = np.nonzero(ordered * np.arange(1, M + 1) > np.cumsum(ordered) - 1)[0][-1]
        new = np.maximum(moved - (np.cumsum(ordered)[k] - 1) / (k + 1), 0)
        if np.abs(new - weights).max() < 1e-12:
            break
        weights = new
    np.testing.assert_allclose(result.weights, weights, atol=1e-4)  # finite differences, accumulated
    assert result.n_gradient_images == N
    assert result.shrinkage_intensity == 0


def test_mixing_gap_is_measured_on_the_sample():
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    result = fast_ensemble(prompts, _batches(images, labels), backbone=model)
    with torch.no_grad():
        mixed = literal.features(model, result.prompt[None], images)[0]
        blend = torch.tensordot(result.weights, literal.features(model, prompts, images), dims=1)
    a = result.shrinkage_intensity
    assert result.sample_h_score == pytest.approx(literal.h_score(blend, labels.numpy(), a), rel=1e-5)
    assert result.sample_h_score_mixed_prompt == pytest.approx(literal.h_score(mixed, labels.numpy(), a), rel=1e-5)


def test_without_gradients():
    result = fast_ensemble(
        _prompts(), _batches(*_task()), backbone=literal.tiny_vit().double(), lam=0, gradient_images=0
    )
    assert result.gradient_cosines.isnan().all()
    assert result.n_gradient_images == 0
    assert float(result.weights.sum()) == pytest.approx(1)
    with pytest.raises(OptionError, match="nothing to align"):
        fast_ensemble(_prompts(), _batches(*_task()), backbone=literal.tiny_vit(), gradient_images=0)


def test_labels_need_not_be_contiguous():
    model, (images, labels), prompts = literal.tiny_vit().double(), _task(), _prompts()
    plain = fast_ensemble(prompts, _batches(images, labels), backbone=model)
    odd = fast_ensemble(prompts, _batches(images, torch.tensor([3, 900, 10**9])[labels]), backbone=model)
    assert torch.equal(plain.weights, odd.weights)
    assert odd.classes == (3, 900, 10**9)


def test_class_with_one_image():
    images, labels = _task()
    labels[labels == 2] = 1
    labels[5] = 2
    result = fast_ensemble(_prompts(), _batches(images, labels), backbone=literal.tiny_vit().double())
    assert result.n_classes == 3
    assert result.weights.isfinite().all()


def test_prompt_forms_and_names():
    model, batches, prompts = (
        literal.tiny_vit(),
        _batches(*_task(torch.float32)),
        _prompts(dtype=torch.float32),
    )
    info = FrozenViT.from_timm(model).info
    forms = [
        prompts,
        list(prompts),
        dict(zip(NAMES, prompts, strict=True)),
        PromptPool(prompts, backbone=info),
    ]
    results = [fast_ensemble(form, batches, backbone=model) for form in forms]
    assert all(torch.equal(r.weights, results[0].weights) for r in results)
    assert results[2].names == NAMES
    single = fast_ensemble(prompts[:1], batches, backbone=model)
    assert single.weights.tolist() == [1.0]


def test_a_head_without_a_graph_is_named():
    def head(features):
        with torch.no_grad():
            return features[:, :C]

    with pytest.raises(OptionError, match="no gradient in the prompts"):
        fast_ensemble(_prompts(), _batches(*_task()), backbone=literal.tiny_vit().double(), head=head)


def test_leaves_no_trace_in_an_embedding_program(capfd):
    model = literal.tiny_vit().train()
    model.norm.weight.requires_grad_(False)
    head = torch.nn.Linear(16, C)
    prompts = _prompts(dtype=torch.float32).requires_grad_()
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    weights = copy.deepcopy(model.state_dict())
    torch.set_default_dtype(torch.float64)
    try:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is meant
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for h in ("lda", head):
                fast_ensemble(prompts, _batches(*_task(torch.float32)), backbone=model, head=h)
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_default_device() == torch.device("cpu")
    assert model.training
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert prompts.grad is None
    assert prompts.requires_grad
    assert capfd.readouterr() == ("", "")


def test_default_dtype_of_the_caller_does_not_matter():
    batches, prompts, model = (
        _batches(*_task(torch.float32)),
        _prompts(dtype=torch.float32),
        literal.tiny_vit(),
    )
    plain = fast_ensemble(prompts, batches, backbone=model)
    torch.set_default_dtype(torch.float64)
    try:
        other = fast_ensemble(prompts, batches, backbone=model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain.weights, other.weights)
    with torch.inference_mode():
        assert torch.equal(fast_ensemble(prompts, batches, backbone=model).weights, plain.weights)


def test_progress_by_callback(capfd):
    seen = []
    fast_ensemble(
        _prompts(), _batches(*_task()), backbone=literal.tiny_vit().double(), folds=2,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )  # fmt: skip
    assert [s for s in seen if s[0] == "images"] == [("images", i, 5) for i in range(6)]
    assert ("gradients", 2, 2) in seen
    fast_ensemble(_prompts(), _batches(*_task()), backbone=literal.tiny_vit().double(), progress=True)
    assert capfd.readouterr().out == ""


def _with(images=None, labels=None):
    good_images, good_labels = _task(torch.float32)
    return [
        (
            good_images if images is None else images(good_images),
            good_labels if labels is None else labels(good_labels),
        )
    ]


def _poison(value):
    def change(x):
        x = x.clone()
        x[3, 0, 2, 2] = value
        return x

    return change


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "no images"),
        (_with(images=lambda x: x[:0], labels=lambda y: y[:0]), "no images"),
        (_with(labels=torch.zeros_like), "at least two classes"),
        (_with(labels=lambda y: y.float()), "integer"),
        (_with(labels=lambda y: y - 1), "from 0 on"),
        (_with(labels=lambda y: y[:-1]), r"labels must be \[48\]"),
        (_with(labels=lambda y: torch.nn.functional.one_hot(y)), r"labels must be \[48\]"),
        (_with(images=_poison(float("nan"))), r"images \[3\] hold NaN"),
        (_with(images=_poison(float("-inf"))), r"images \[3\] hold NaN"),
        (_with(images=lambda x: x[:, :, :8]), "resize them"),
        (_with(images=lambda x: x[:, :1]), r"\[B, 3, 16, 16\]"),
        ([torch.zeros(2, 3, 16, 16)], "pair"),
        ([{"image": 1}], "dict"),
        ([(1, 2, 3)], "tuple of 3"),
        (7, "iterable"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_loaders(loader, message):
    with pytest.raises(DataError, match=message):
        fast_ensemble(_prompts(dtype=torch.float32), loader, backbone=literal.tiny_vit())


def test_loader_that_dies_and_keyboard_interrupt():
    batches = _batches(*_task(torch.float32))

    def dying(error):
        yield from batches[:2]
        raise error

    with pytest.raises(DataError, match=r"failed after 2 batches: OSError: disk gone") as caught:
        fast_ensemble(_prompts(dtype=torch.float32), dying(OSError("disk gone")), backbone=literal.tiny_vit())
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(KeyboardInterrupt):
        fast_ensemble(_prompts(dtype=torch.float32), dying(KeyboardInterrupt()), backbone=literal.tiny_vit())


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (torch.full((2, P, 16), float("nan")), "NaN|finite"),
        (torch.full((2, P, 16), float("inf")), "NaN|inf|finite"),
        ([torch.zeros(3, 16), torch.zeros(4, 16)], "shape"),
        (torch.zeros(2, P, 17), "17"),
        ([], "no prompts|zero prompts|M = 0|empty"),
        ({}, "no prompts|zero prompts|M = 0|empty"),
        (torch.zeros(2, 5, P, 16), "5 layers"),
        ("pool.safetensors", "PromptPool.load"),
    ],
    ids=["nan", "inf", "shapes", "width", "empty list", "empty dict", "depth", "path"],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(PromptError, match=message):
        fast_ensemble(prompts, _batches(*_task(torch.float32)), backbone=literal.tiny_vit())


def test_prompt_that_makes_features_constant():
    model = literal.tiny_vit()
    with torch.no_grad():  # every value vector becomes the same, and CLS alone enters the residual stream
        for block in model.blocks:
            block.attn.qkv.weight[32:].zero_()
    with pytest.raises(PromptError, match="same feature for every image"):
        fast_ensemble(_prompts(dtype=torch.float32), _batches(*_task(torch.float32)), backbone=model)


def test_dead_prompt_is_said_and_left_out():
    model, batches, prompts = literal.tiny_vit().double(), _batches(*_task()), _prompts()

    heads = [torch.nn.Linear(16, C).double() for _ in range(M)]
    torch.nn.init.zeros_(heads[2].weight)
    with pytest.warns(HGPromptWarning, match="prompt_2"):
        result = fast_ensemble(prompts, batches, backbone=model, head=heads)
    assert float(result.gradient_cosines[2].abs().max()) == 0
    assert result.alignment_loss == result.alignment_loss


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lam": -1}, OptionError, "lam"),
        ({"lam": float("inf")}, OptionError, "lam"),
        ({"folds": 0}, OptionError, "folds"),
        ({"head": "mlp"}, OptionError, "head must be"),
        ({"head": [torch.nn.Linear(16, 3)]}, OptionError, "one per prompt"),
        ({"head": torch.nn.Linear(16, 2)}, DataError, "logits"),
        ({"preset": "magic"}, OptionError, "preset"),
        ({"shrinkage": 1.5}, OptionError, "shrinkage"),
        ({"micro_batch": 0}, OptionError, "micro_batch"),
        ({"impl": "magic"}, OptionError, "impl"),
        ({"gradient_images": -1}, OptionError, "gradient_images"),
        ({"backbone": None}, BackboneError, "name no backbone"),
        ({"backbone": torch.nn.Linear(2, 2)}, BackboneError, "not a timm"),
        ({"backbone": "no_such_model"}, BackboneError, "knows no model"),
        ({"dtype": torch.int64}, HGPromptError, "dtype"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        fast_ensemble(
            _prompts(dtype=torch.float32),
            _batches(*_task(torch.float32)),
            **({"backbone": literal.tiny_vit()} | options),
        )


def test_pool_of_another_backbone_is_refused():
    model, other = literal.tiny_vit(seed=0), literal.tiny_vit(seed=1)
    pool = PromptPool(_prompts(dtype=torch.float32), backbone=FrozenViT.from_timm(other).info)
    with pytest.raises(PromptError, match="backbone"):
        fast_ensemble(pool, _batches(*_task(torch.float32)), backbone=model)
    unknown = PromptPool(_prompts(dtype=torch.float32), backbone=BackboneInfo("x", "", 16, 3, (16, 16)))
    fast_ensemble(unknown, _batches(*_task(torch.float32)), backbone=model)


def test_frozen_backbone_is_not_moved():
    vit = FrozenViT.from_timm(literal.tiny_vit())
    batches, prompts = _batches(*_task(torch.float32)), _prompts(dtype=torch.float32)
    low = fast_ensemble(prompts, batches, backbone=vit, dtype=torch.bfloat16)
    assert vit.dtype == torch.float32
    assert low.settings["dtype"] == "bfloat16"
    assert hgprompt.fast_ensemble is fast_ensemble


@pytest.mark.parametrize(
    "options",
    [
        {"shrinkage": "magic"}, {"solver": "magic"}, {"starts": 0}, {"lam": -1}, {"micro_batch": 0}, {"max_steps": 0},
        {"gap_tolerance": -1.0}, {"gap_tolerance": float("nan")}, {"learning_rate": 0.0}, {"device": "gpu"},
        {"head": [torch.nn.Linear(16, 3)], "checkpoint_dir": "not made"},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_found_before_the_images_are_read(options):
    def loader():
        raise AssertionError("read")
        yield

    with pytest.raises(OptionError):
        fast_ensemble(_prompts(), loader(), backbone=literal.tiny_vit(), **options)
    assert not Path("not made").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_prompt_that_tells_all_images_apart_keeps_its_gradient(dtype):
    """Its loss is as good as zero; its direction is not, and low precision must not lose it."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randn(60, 3, 16, 16, generator=g) * 0.05 + 3.0 * (labels[:, None, None, None] - 0.5)
    prompts = torch.randn(3, 2, 16, generator=g)
    model = literal.tiny_vit()
    exact = fast_ensemble(prompts.double(), [(images.double(), labels)], backbone=model, dtype=torch.float64)
    found = fast_ensemble(prompts, [(images, labels)], backbone=model, dtype=dtype)
    assert bool((found.gradient_cosines.diagonal() > 0.99).all())  # a zero gradient has a zero row
    # Directions in a low precision differ; at λ = 1 weights follow them smoothly, and none may vanish.
    assert float((found.weights - exact.weights).abs().sum()) < 0.1


def test_numpys_numbers_are_numbers(tmp_path):
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 2
    prompts = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    plain = {"seed": 2, "folds": 3, "starts": 4, "gradient_images": 9, "lam": 0.5, "gap_tolerance": 1e-6}
    as_numpy = {k: np.float64(v) if isinstance(v, float) else np.int64(v) for k, v in plain.items()}
    expected, found = (
        fast_ensemble(prompts, [(images, labels)], backbone=literal.tiny_vit(), **options)
        for options in (plain, as_numpy | {"lam": np.float32(0.5)})
    )
    assert torch.equal(found.weights, expected.weights)
    found.save(tmp_path)
    assert EnsembleResult.load(tmp_path).settings == expected.settings


@pytest.mark.parametrize(
    "options", [{"lam": "1"}, {"lam": None}, {"seed": 1.5}, {"seed": -1}, {"folds": 2.5}, {"starts": 1.5},
                {"micro_batch": 1.5}, {"tolerance": "0.1"}], ids=str
)  # fmt: skip
def test_what_is_no_number_is_named(options):
    (name,) = options
    with pytest.raises(OptionError, match=rf"^{name} must be"):
        fast_ensemble(torch.randn(2, 2, 16), [], backbone=literal.tiny_vit(), **options)
