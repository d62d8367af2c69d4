"""When to stop reading images: as soon as α is known well enough."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from hgprompt.errors import OptionError, warn
from hgprompt.uncertainty import weight_error

logger = logging.getLogger(__name__)

FIRST = 64
"""Images before the first look at α."""
GROWTH = 1.5
"""How many times as many images the next look has: looks cost solves, and a stop comes too late by half of this."""
LOOKS, FACTOR = 3, 2.0
"""A look alone is often too sure of itself: the largest of the last three bounds counts, twice (docs/choices.md)."""


class StopRule:
    """Stops where a bound on ‖α - α_∞‖₁ falls to the tolerance.

    A look finds the larger of two: what the sampling of the images leaves open (`weight_error`), and how far α has
    moved since half the images. The second sees what no resampling does, the drift of α as the shrinkage of the
    covariance fades: a drift of b/N moves α from N/2 to N by as much as is still to come. Neither sees a minimum that
    takes over later, and to stop at the first small bound is to choose the looks that are too sure: the bound is twice
    the largest of three looks.

    It asks for a shuffled stream: as long as the labels of the first and of the second half are not of one mixture, it
    lets the stream run on, with a warning.

    Args:
        tolerance: on ‖α - α_∞‖₁, above 0 (2 is the largest distance there is). folds: of the statistics.

    Attributes:
        num_images: seen so far. error: the bound at the last look; NaN before.
    """

    def __init__(self, tolerance: float, folds: int) -> None:
        if not 0 < tolerance < math.inf:
            raise OptionError(f"tolerance must be positive and finite (an L1 distance of weights), got {tolerance}")
        if folds < 2:
            raise OptionError("tolerance needs an estimate of the error: folds must be at least 2")
        self.tolerance = tolerance
        self.num_images = 0
        self.error = math.nan
        self._next = max(FIRST, 4 * folds)
        self._labels: list[Tensor] = []
        self._looks: list[tuple[int, Tensor]] = []
        self._found: list[float] = []
        self._warned = False

    def due(self, labels: Tensor) -> bool:
        """Note the labels [B] of one more batch. Is it time to look at α?"""
        self._labels.append(labels)
        self.num_images += len(labels)
        if self.num_images < self._next:
            return False
        self._next = math.ceil(self.num_images * GROWTH)
        if looks_shuffled(torch.cat(self._labels)):
            return True
        if not self._warned:
            self._warned = True
            warn(
                "the labels of the first and the second half of the images differ too much for a shuffled stream: "
                "reading on, since a part of a sorted stream says nothing of the rest; shuffle it"
            )
        return False

    def look(self, weights: Tensor, weights_without_fold: Tensor) -> bool:
        """Note α [M], and α with each fold left out [K, M], of all images so far. Is it known well enough?"""
        if self._looks and self._looks[-1][0] == self.num_images:  # another look at the same images
            self._looks.pop()
            self._found.pop()
        self._looks.append((self.num_images, weights))
        bound = max(weight_error(weights_without_fold), self._moved(weights))
        self._found.append(math.inf if math.isnan(bound) else bound)  # without some fold, α is not known
        self.error = FACTOR * max(self._found[-LOOKS:]) if len(self._found) >= LOOKS else math.inf
        logger.info("%d images: α is known to %.3f (L1)", self.num_images, self.error)
        return self.error <= self.tolerance

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the looks taken: images [n] int64, weights [n, M] and bounds [n], which may be infinite. What labels tell
        is not in it: a stream that is read again goes through `due` again."""
        positions = torch.tensor([n for n, _ in self._looks], dtype=torch.int64, device="cpu")
        none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        weights = torch.stack([w for _, w in self._looks]) if self._looks else none
        return positions, weights, torch.tensor(self._found, dtype=torch.float64, device="cpu")

    def restore(self, positions: Tensor, weights: Tensor, found: Tensor) -> None:
        """Put back the looks of `state`."""
        self._looks = list(zip(positions.tolist(), weights.unbind(0), strict=True))
        self._found = found.tolist()

    def _moved(self, weights: Tensor) -> float:
        earlier = [w for n, w in self._looks if 2 * n <= self.num_images]
        return float((weights - earlier[-1]).abs().sum()) if earlier else math.inf


def looks_shuffled(labels: Tensor) -> bool:
    """Whether the labels [N] of the two halves of a stream may come from one mixture of classes: a chi-squared test of
    homogeneity, which a shuffled stream fails once in 10,000 times."""
    half = len(labels) // 2
    _, index = labels[: 2 * half].unique(return_inverse=True)
    classes = int(index.max()) + 1 if half else 0
    if classes < 2:
        return half > 0
    first, second = (part.bincount(minlength=classes).double() for part in (index[:half], index[half:]))
    statistic = float(((first - second).square() / (first + second)).sum())
    spread = 2 / (9 * (classes - 1))
    quantile = (classes - 1) * (1 - spread + 3.72 * math.sqrt(spread)) ** 3  # Wilson & Hilferty 1931
    return statistic <= quantile
