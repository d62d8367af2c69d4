"""Cosines of gradients against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from rule import assert_by_rule

pytest.importorskip("triton")
from hgprompt.kernels import gram

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5), (2, 192), (5, 3, 17), (13, 1000), (40, 130)]  # with 40 prompts there are several tiles
pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def _gradients(*shape, seed=0):
    """With something in common, as gradients of one task have: cosines are not all near zero."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) + torch.randn(shape[1:], generator=g)).to(DEVICE)


def _in_float32(gradients):
    """The specification in float32: PyTorch's own result in that precision."""
    g = torch.nn.functional.normalize(gradients.flatten(1), dim=1)
    return g @ g.T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_equals_plain(shape):
    gradients = _gradients(*shape)
    actual, exact = gram.gram(gradients), gram.gram_reference(gradients)
    assert actual.dtype == torch.float64
    assert_by_rule(actual.float(), _in_float32(gradients), exact, 2)  # products are float32's: so is the rule
    assert torch.equal(actual, actual.T)
    # A product with itself, divided twice by its root: four roundings.
    torch.testing.assert_close(actual.diagonal(), torch.ones_like(actual[0]), rtol=0, atol=4 * 2**-53)
    assert torch.equal(actual, gram.gram(gradients))


def test_zero_gradients_have_zero_rows():
    gradients = _gradients(5, 70)
    gradients[[0, 3]] = 0
    actual = gram.gram(gradients)
    assert torch.equal(actual == 0, gram.gram_reference(gradients) == 0)
    assert_by_rule(actual.float(), _in_float32(gradients), gram.gram_reference(gradients), 2)


def test_the_scale_of_a_gradient_does_not_matter():
    """Squares of 1e-25 or 1e25 are beyond float32; powers of two keep every bit."""
    gradients = _gradients(4, 100)
    scaled = gradients * torch.tensor([2.0**-85, 1.0, 2.0**85, 2.0**-20], device=DEVICE)[:, None]
    assert torch.equal(gram.gram(scaled), gram.gram(gradients))


def test_subnormal_and_largest_numbers():
    gradients = _gradients(3, 50)
    gradients[0] *= 1e-36 / gradients[0].abs().max()
    gradients[1] *= 3e38 / gradients[1].abs().max()
    peer = _in_float32(gradients / gradients.abs().amax(1, keepdim=True))
    assert_by_rule(gram.gram(gradients).float(), peer, gram.gram_reference(gradients), 2)


def test_opposite_gradients():
    """Exactly -1, as Eq. 10 needs to see that their mean has no direction."""
    gradients = _gradients(1, 333).repeat(2, 1)
    gradients[1] *= -1
    actual = gram.gram(gradients)
    torch.testing.assert_close(actual[0, 1], -torch.ones_like(actual[0, 1]), rtol=0, atol=4 * 2**-53)


def test_what_is_not_finite_stays_so():
    gradients = _gradients(3, 40)
    gradients[1, 7] = torch.nan
    actual = gram.gram(gradients)
    assert actual[1].isnan().all()
    assert actual[0, 2].isfinite()


@pytest.mark.parametrize("shape", [(1, 2, 20), (3, 5, 2, 40), (4, 40, 70)], ids=str)
def test_folds_equal_plain(shape):
    parts = _gradients(*shape)
    parts[:, 0] = 0
    parts[1:, 1] = 0  # nothing is left of the second prompt's gradient without the first fold
    whole, without = gram.grams(parts)
    exact, exact_without = gram.grams_reference(parts)
    total = parts.sum(0)
    assert_by_rule(whole.float(), _in_float32(total), exact, 2)
    for fold in range(len(parts)):
        assert torch.equal(without[fold] == 0, exact_without[fold] == 0)
        if exact_without[fold].any():
            peer = _in_float32(total - parts[fold])
            assert_by_rule(without[fold].float(), peer, exact_without[fold], 2, f"fold {fold}")
    assert torch.equal(whole, gram.gram(total))
    assert torch.equal(without, gram.grams(parts)[1])


def test_any_strides():
    gradients = _gradients(6, 50)
    wide = torch.cat([gradients, torch.full_like(gradients, torch.nan)], dim=1)
    assert torch.equal(gram.gram(wide[:, :50]), gram.gram(gradients))
    assert torch.equal(gram.gram(wide[::2, :50]), gram.gram(gradients[::2].contiguous()))
    parts = _gradients(5, 3, 50).transpose(0, 1)
    assert torch.equal(gram.grams(parts)[1], gram.grams(parts.contiguous())[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_computed_plainly(dtype):
    gradients = _gradients(2, 3, 20).to(dtype)
    assert torch.equal(gram.gram(gradients[0]), gram.gram_reference(gradients[0]))
    assert torch.equal(gram.grams(gradients)[1], gram.grams_reference(gradients)[1])
