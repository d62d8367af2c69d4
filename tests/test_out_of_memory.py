"""A GPU whose memory runs out: micro-batches are halved, and nothing is counted twice or not at all.

The GPU is a fake that raises PyTorch's own error above a number of image-prompt pairs, on the way forward or back.
"""

from __future__ import annotations

import logging

import literal
import pytest
import torch

from hgprompt import fast_ensemble, network
from hgprompt.backbone import FrozenViT
from hgprompt.data import LabelledImages
from hgprompt.encoder import MicroBatch, encode, pull_back
from hgprompt.errors import DeviceMemoryError
from hgprompt.tuning import TuneConfig, tune

M, B = 3, 10


class SmallDevice:
    """Room for so many pairs, and none at the calls of these numbers whatever their size.

    Attributes:
        pairs: of each call that had room. refused: of each that had none.
    """

    def __init__(self, room, monkeypatch, where="forward", bad_calls=()):
        self.room, self.bad_calls, self.pairs, self.refused = room, set(bad_calls), [], []
        features, self._latest = network.features, 0

        def forward(vit, tokens, prompts, ops):
            self._latest = len(prompts) * tokens.x.shape[-3]
            if where == "forward":
                self._need(self._latest)
            return features(vit, tokens, prompts, ops)

        grad = torch.autograd.grad

        def backward(*arguments, **options):
            gradients = grad(*arguments, **options)  # the memory runs out late: all of it was computed
            self._need(self._latest)
            return gradients

        monkeypatch.setattr(network, "features", forward)
        if where == "backward":
            monkeypatch.setattr(torch.autograd, "grad", backward)

    def _need(self, pairs):
        if pairs > self.room or len(self.pairs) + len(self.refused) in self.bad_calls:
            self.refused.append(pairs)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        self.pairs.append(pairs)


def _problem(deep=False):
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    g = torch.Generator().manual_seed(0)
    prompts = torch.randn((M, vit.depth, 4, 16) if deep else (M, 4, 16), generator=g, dtype=torch.float64)
    images = torch.randn(B, 3, 16, 16, generator=g, dtype=torch.float64)
    return vit, prompts, images, torch.randn(M, B, 16, generator=g, dtype=torch.float64)


def test_a_full_device_that_triton_finds_counts_too(monkeypatch):
    """The driver's own words, when a kernel is first loaded; any other RuntimeError is nobody's memory."""
    vit, prompts, images, _ = _problem()
    expected = encode(vit, prompts, images)
    exact, words = network.features, ["Triton Error [CUDA]: out of memory"]

    def features(*arguments):
        if words:
            raise RuntimeError(words.pop())
        return exact(*arguments)

    monkeypatch.setattr(network, "features", features)
    _equal(encode(vit, prompts, images), expected)
    words.append("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        encode(vit, prompts, images)


def _equal(actual, expected):
    # Other micro-batches are other shapes of the same products in float64: a few roundings.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("room", [1, 2, 5, 29])
def test_forward_goes_on_with_smaller_micro_batches(room, deep, monkeypatch):
    vit, prompts, images, _ = _problem(deep)
    with torch.no_grad():
        expected = encode(vit, prompts, images)
        device = SmallDevice(room, monkeypatch)
        _equal(encode(vit, prompts, images, micro_batch=M * B), expected)
    assert device.refused
    assert sum(device.pairs) >= M * B


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("room", "bad_calls"), [(1, ()), (4, ()), (12, (3, 6)), (B, (1, 2, 9)), (29, ())])
def test_pull_back_counts_every_pair_once(room, bad_calls, where, monkeypatch):
    vit, prompts, images, weights = _problem()

    def loss(features, m, b):
        return (features.tanh() * weights[m, b]).sum((1, 2))

    expected = pull_back(vit, prompts, images, loss)
    device = SmallDevice(room, monkeypatch, where, bad_calls)
    for actual, wanted in zip(pull_back(vit, prompts, images, loss, micro_batch=M * B), expected, strict=True):
        _equal(actual, wanted)
    assert device.refused


def test_images_of_each_prompt(monkeypatch):
    vit, prompts, images, _ = _problem()
    own = torch.stack([images + i for i in range(M)])
    with torch.no_grad():
        expected = encode(vit, prompts, own)
        SmallDevice(4, monkeypatch)
        _equal(encode(vit, prompts, own, micro_batch=M * B), expected)


def test_autograd_through_encode(monkeypatch):
    vit, prompts, images, weights = _problem()
    prompts.requires_grad_()
    (expected,) = torch.autograd.grad((encode(vit, prompts, images) * weights).sum(), prompts)
    SmallDevice(7, monkeypatch)
    (actual,) = torch.autograd.grad((encode(vit, prompts, images, micro_batch=M * B) * weights).sum(), prompts)
    _equal(actual, expected)


def test_a_pass_remembers_and_says_so_once(monkeypatch, caplog):
    vit, prompts, images, _ = _problem()
    labels = torch.arange(B) // 2 % 2  # both in each fold
    batches = [(images + i, labels) for i in range(4)]
    options = {"backbone": vit, "folds": 2, "micro_batch": M * B}
    for head in ("shared-lda", lambda features: features[:, :2]):
        expected = fast_ensemble(prompts, batches, head=head, **options)
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "hgprompt"):
            caplog.clear()
            device = SmallDevice(5, patch)
            result = fast_ensemble(prompts, batches, head=head, **options)
        # α where a solver stops: as far apart as its gap of 1e-6 leaves it, and not as the roundings.
        torch.testing.assert_close(result.weights, expected.weights, rtol=0, atol=1e-6)
        _equal(result.gradient_cosines, expected.gradient_cosines)
        assert result.h_score == pytest.approx(expected.h_score, rel=1e-6)
        assert len(device.refused) <= 4  # 30, 15, 7 pairs, or less with a fold's images: in the first batch alone
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "going on with" in caplog.text


def test_tuning_remembers_from_step_to_step(monkeypatch):
    vit, prompts, images, _ = _problem()
    task = LabelledImages("task", (images.clamp(0, 1) * 255).byte(), torch.arange(B) % 2)
    device = SmallDevice(5, monkeypatch)
    tune(
        vit, {f"start {i}": p.float() for i, p in enumerate(prompts)}, task,
        config=TuneConfig(epochs=3, batch_size=B // 2), micro_batch=M * B,
    )  # fmt: skip
    assert 0 < len(device.refused) <= 3  # 15, 7 pairs in the first step alone, of six


def test_one_pair_that_does_not_fit_is_an_error_that_says_what_to_do(monkeypatch):
    vit, prompts, images, _ = _problem()
    SmallDevice(0, monkeypatch)
    with pytest.raises(DeviceMemoryError, match=r"one image under one prompt \(CUDA out of memory.*smaller backbone"):
        encode(vit, prompts, images)


def test_a_limit_is_kept_from_call_to_call(monkeypatch):
    vit, prompts, images, _ = _problem()
    limit = MicroBatch()
    device = SmallDevice(6, monkeypatch)
    with torch.no_grad():
        encode(vit, prompts, images, micro_batch=limit)
        before = len(device.refused)
        encode(vit, prompts, images, micro_batch=limit)
    assert before > 0
    assert len(device.refused) == before
