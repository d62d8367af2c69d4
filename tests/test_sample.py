"""Reservoir sample: uniform, reproducible, blind to the batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hgprompt.sample import ImageSample, folds_of


def _fill(n, capacity, batch, seed=0, folds=3):
    sample = ImageSample(capacity, folds, seed)
    images = torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1)
    for i in range(0, n, batch):
        labels = torch.arange(n)[i : i + batch]
        sample.update(images[i : i + batch], labels, torch.stack([labels, -labels])[..., None].float())
    return sample


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_do_not_matter(batch):
    images, labels, features = _fill(100, 20, batch).all()
    assert torch.equal(images, _fill(100, 20, 13).all()[0])
    assert len(images) == 20
    assert torch.equal(images.flatten().long(), labels)
    assert torch.equal(features[1, :, 0].long(), -labels)
    assert torch.equal(labels, labels.sort().values)


def test_every_image_has_the_same_chance():
    counts = torch.zeros(40)
    for seed in range(600):
        counts[_fill(40, 10, 40, seed).all()[1]] += 1
    # Binomial(600, 1/4): standard deviation 10.6; five of them never happen over 40 counts.
    assert float((counts - 150).abs().max()) < 5 * 10.6


def test_folds_are_those_of_the_stream():
    sample = _fill(50, 15, 8)
    parts = [sample.fold(k)[1] for k in range(3)]
    expected = folds_of(np.arange(50), 3)
    assert all((expected[part] == k).all() for k, part in enumerate(parts))  # an image's label is its place
    assert sum(map(len, parts)) == 15
    assert sample.nbytes == 15 * 4 * 3


def test_all_and_none():
    assert len(_fill(30, None, 7)) == 30
    assert len(_fill(30, 0, 7)) == 0
    assert len(_fill(30, 0, 7).all()[0]) == 0


@given(n=st.integers(1, 200), folds=st.integers(1, 12), ranks=st.integers(1, 5))
def test_folds_are_of_one_size_and_blind_to_ranks(n, folds, ranks):
    whole = folds_of(np.arange(n), folds)
    sizes = np.bincount(whole, minlength=folds)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1
    for r in range(ranks):
        assert (folds_of(np.arange(r, n, ranks), folds) == whole[r::ranks]).all()


@pytest.mark.parametrize("folds", [2, 3, 8])
@pytest.mark.parametrize("classes", [2, 3, 8, 16, 24])
@pytest.mark.parametrize("order", ["in turn", "sorted"])
def test_no_class_is_in_one_fold_alone(folds, classes, order):
    labels = np.arange(40 * classes) % classes
    if order == "sorted":
        labels.sort()
    fold_of = folds_of(np.arange(len(labels)), folds)
    # 40 images that each go to any of 8 folds: all miss one of them with probability 8 · (7/8)^40 = 4 %, and are in
    # one alone with 8^-39. Deterministic, so that this says that the numbers drawn are no worse than that.
    assert all(len(np.unique(fold_of[labels == c])) > max(1, folds - 2) for c in range(classes))


def test_a_batch_may_be_written_over_afterwards():
    sample = ImageSample(None, 1, 0)
    image, label, feature = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.zeros(2, 1, 1)
    for i in range(5):
        for buffer in (image, label, feature):
            buffer.fill_(i)
        sample.update(image, label, feature)
    images, labels, features = sample.all()
    assert images.flatten().tolist() == features[1].flatten().tolist() == labels.tolist() == [0, 1, 2, 3, 4]
