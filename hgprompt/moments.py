"""Second moments of the features of M prompts, jointly, and their class sums; additive over images.

Sums are taken about a pilot centre (the mean of the first batch), in float64, so that a mean far from zero costs no
digits; merging moves one pilot to the other exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hgprompt.distributed import Ranks
from hgprompt.errors import StatisticsError
from hgprompt.kernels import moments as kernels
from hgprompt.kernels.compiler import copied
from hgprompt.kernels.mixture import assemble, assemble_reference, block_products, block_products_reference, mix

_IMAGES_AT_ONCE = 1024  # bounds the float64 copy of a batch


def class_sums(y: Tensor, index: Tensor, num_classes: int) -> Tensor:
    """Sums over the images of each class: y [M, N, h], class of each image [N] → [M, C, h]. The same bits every time.

    On a GPU index_add adds atomically, in any order: there, a product with the classes' indicator takes its place.
    """
    index = index.to(y.device)
    if y.is_cuda:
        return torch.einsum("nc,mnh->mch", torch.nn.functional.one_hot(index, num_classes).to(y.dtype), y)
    return y.new_zeros(len(y), num_classes, y.shape[2]).index_add_(1, index, y)


def mixed(parts: Tensor, weights: Tensor) -> Tensor:
    """Σ α_i x_i in float64 of parts x [M, ...] of any dtype and weights [M]; what has no weight is not read."""
    total = torch.zeros(parts.shape[1:], dtype=torch.float64, device=parts.device)
    for i, weight in enumerate(weights.tolist()):
        if weight:
            total.add_(parts[i], alpha=weight)
    return total


class Moments:
    """Sums over images of y = f - centre, for M prompts at once.

    Attributes:
        count: number of images. centre: pilot [M, h]. sums: Σ y [M, h].
        rows: M tensors; rows[i] is [h, M-i, h] and holds Σ y_i y_jᵀ for j = i … M-1.
        class_counts, class_sums: per label, number of images and Σ y [M, h].
        third, fourth: Σ ‖ȳ‖² ȳ [h] and Σ ‖ȳ‖⁴ [] of the uniform mixture ȳ = mean over prompts of y, which is what
            Ledoit–Wolf's intensity needs beside second moments.
    """

    def __init__(self, num_prompts: int, width: int) -> None:
        self.num_prompts = num_prompts
        self.width = width
        self.count = 0
        self.centre: Tensor | None = None
        self.sums = torch.zeros(num_prompts, width, dtype=torch.float64, device="cpu")
        self.rows: list[Tensor] = []
        self.class_counts: dict[int, int] = {}
        self.class_sums: dict[int, Tensor] = {}
        self.third = torch.zeros(width, dtype=torch.float64, device="cpu")
        self.fourth = torch.zeros((), dtype=torch.float64, device="cpu")

    @staticmethod
    def bytes_for(num_prompts: int, width: int, num_classes: int) -> int:
        """Bytes that moments of this size take."""
        pairs = num_prompts * (num_prompts + 1) // 2
        return 8 * (pairs * width * width + (num_classes + 2) * num_prompts * width)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.bytes_for(self.num_prompts, self.width, len(self.class_sums)) if self.count else 0

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add images: features [M, B, h] floating point, labels [B] int64."""
        for start in range(0, features.shape[1], _IMAGES_AT_ONCE):
            chosen = slice(start, start + _IMAGES_AT_ONCE)
            self._update(features[:, chosen], labels[chosen])

    def _update(self, x: Tensor, labels: Tensor) -> None:
        if self.centre is None:
            self.centre = x.double().mean(1)
            self._allocate(x.device)
        classes, index = labels.unique(return_inverse=True)
        if x.is_cuda:
            sums = kernels.class_sums(x, self.centre, index, len(classes))
            # What the features lost to rounding is more than float32's products lose; float32 features have the
            # library's float64 products.
            add = kernels.add_moments if x.dtype.itemsize < 4 else kernels.add_moments_reference
            add(self.rows, x, self.centre)
            uniform = mix(x, self.centre, x.new_full((len(x),), 1 / len(x), dtype=torch.float64))
        else:
            y = x.double() - self.centre[:, None]
            sums = class_sums(y, index, len(classes))
            for i, row in enumerate(self.rows):
                row += torch.einsum("bk,mbl->kml", y[i], y[i:])
            uniform = y.mean(0)
        self.count += x.shape[1]
        self.sums += sums.sum(1)
        counts = index.bincount(minlength=len(classes))
        for label, number, total in zip(classes.tolist(), counts.tolist(), sums.unbind(1), strict=True):
            self._add_class(label, number, total)
        square = uniform.square().sum(1)
        self.third += square @ uniform
        self.fourth += square.square().sum()

    def merge(self, other: Moments) -> None:
        """Add the images of `other`, which stays as it is."""
        if other.centre is None:
            return
        if self.centre is None:
            self.centre = other.centre.clone()
            self._allocate(other.centre.device)
        shift, n, s = (
            other.centre - self.centre,
            other.count,
            other.sums,
        )  # y about our centre = theirs + shift
        self._merge_fourth(other, shift.mean(0))
        for i, (row, theirs) in enumerate(zip(self.rows, other.rows, strict=True)):
            cross = torch.einsum("k,ml->kml", s[i] + n * shift[i], shift[i:])
            row += theirs + cross + torch.einsum("k,ml->kml", shift[i], s[i:])
        self.count += n
        self.sums += s + n * shift
        for label, total in other.class_sums.items():
            number = other.class_counts[label]
            self._add_class(label, number, total + number * shift)

    def recentre(self, centre: Tensor) -> None:
        """Move the pilot to `centre` [M, h], exactly, in place; empty moments are allocated about it."""
        if self.centre is None:
            self.centre = centre
            self._allocate(centre.device)
            return
        centre = centre.to(self.centre.device)
        shift, n, s = self.centre - centre, self.count, self.sums
        self.third, self.fourth = self.shifted_fourth(shift.mean(0))
        for i, row in enumerate(self.rows):
            row += torch.einsum("k,ml->kml", s[i] + n * shift[i], shift[i:])
            row += torch.einsum("k,ml->kml", shift[i], s[i:])
        self.centre, self.sums = centre, s + n * shift
        for label, total in self.class_sums.items():
            self.class_sums[label] = total + self.class_counts[label] * shift

    def all_reduce(self, ranks: Ranks, centre: Tensor, classes: Sequence[int]) -> None:
        """Add the images of the other ranks. Memory grows by one row and the class sums, whatever the number of ranks.

        Args:
            ranks: all call this. centre: [M, h], the same bits on every rank; any will do, near the mean costs no
                digits. classes: labels that any rank has seen, ascending.
        """
        self.recentre(centre)
        device = self.sums.device
        for i in range(len(self.rows)):
            self.rows[i] = ranks.sum(self.rows[i])
        self.sums, self.third, self.fourth = (ranks.sum(t) for t in (self.sums, self.third, self.fourth))
        counts = ranks.sum(torch.tensor([self.class_counts.get(c, 0) for c in classes], device="cpu")).tolist()
        none = torch.zeros_like(self.sums)
        total = ranks.sum(torch.stack([self.class_sums.get(c, none) for c in classes]))
        seen = [(c, n, t) for c, n, t in zip(classes, counts, total.to(device), strict=True) if n]
        self.class_counts = {c: n for c, n, _ in seen}
        self.class_sums = {c: t for c, _, t in seen}
        self.count = sum(counts)

    def of_prompt(self, prompt: int) -> Moments:
        """Moments of one prompt's features alone. Fourth sums are those of a mixture and do not come along."""
        return self._alone(lambda t: t[prompt : prompt + 1], lambda: self.rows[prompt][:, :1].clone())

    def of_mixture(self, weights: Tensor | None = None) -> Moments:
        """Moments of the mixture Σ α_i y_i [M weights]; None: the uniform one, whose fourth sums come along."""
        if weights is None:
            alone = self._alone(lambda t: t.mean(0, keepdim=True), lambda: self.mixed_second()[:, None])
            alone.third, alone.fourth = self.third.clone(), self.fourth.clone()
            return alone
        return self._alone(lambda t: (weights.to(t) @ t)[None], lambda: self.quadratic(weights)[:, None])

    def _alone(self, select: Callable[[Tensor], Tensor], second: Callable[[], Tensor]) -> Moments:
        alone = Moments(1, self.width)
        if self.centre is not None:
            alone.count, alone.centre, alone.sums = (
                self.count,
                select(self.centre).clone(),
                select(self.sums).clone(),
            )
            alone.rows = [second()]
            alone.third, alone.fourth = (t.to(self.sums.device) for t in (alone.third, alone.fourth))
            alone.class_counts = dict(self.class_counts)
            alone.class_sums = {label: select(total) for label, total in self.class_sums.items()}
        return alone

    def mixed_second(self) -> Tensor:
        """Σ ȳ ȳᵀ [h, h] of the uniform mixture, about the pilot centre."""
        uniform = torch.full((self.num_prompts,), 1 / self.num_prompts, dtype=torch.float64, device="cpu")
        return self.quadratic(uniform)

    def quadratic(self, weights: Tensor) -> Tensor:
        """Σ_ij α_i α_j Σ y_i y_jᵀ, [h, h]: second moments of Σ α_i y_i about the pilot centre."""
        weights = weights.to(self.sums.device)
        return (assemble if weights.is_cuda else assemble_reference)(self.rows, weights)

    def inner(self, matrix: Tensor) -> Tensor:
        """⟨G, Σ y_i y_jᵀ⟩ for all pairs, [M, M], with a symmetric G [h, h]."""
        return (block_products if matrix.is_cuda else block_products_reference)(self.rows, matrix)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers for `from_state_dict`, as they are now; copies."""
        return {
            "count": self.count, "centre": None if self.centre is None else self.centre.clone(),
            "sums": self.sums.clone(), "rows": [row.clone() for row in self.rows],
            "class_counts": dict(self.class_counts), "class_sums": {c: s.clone() for c, s in self.class_sums.items()},
            "third": self.third.clone(), "fourth": self.fourth.clone(),
        }  # fmt: skip

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Moments:
        """The inverse of `state_dict`; copies. StatisticsError: it contradicts itself."""
        sums, counts = state["sums"], state["class_counts"]
        if sums.ndim != 2 or sum(counts.values()) != state["count"] or min(counts.values(), default=1) < 1:
            raise StatisticsError("state contradicts itself: class counts do not add up to the number of images")
        moments = cls(*sums.shape)
        moments.count = int(state["count"])
        moments.centre = None if state["centre"] is None else state["centre"].clone()
        moments.sums, moments.third, moments.fourth = (state[k].clone() for k in ("sums", "third", "fourth"))
        moments.rows = [row.clone() for row in state["rows"]]
        moments.class_counts = dict(state["class_counts"])
        moments.class_sums = {label: total.clone() for label, total in state["class_sums"].items()}
        m, h = sums.shape
        expected = [(h, m - i, h) for i in range(m)] if moments.rows or moments.count else []
        means = [sums, *moments.class_sums.values(), *([] if moments.centre is None else [moments.centre])]
        others = [moments.third, moments.fourth]
        if (
            [tuple(row.shape) for row in moments.rows] != expected
            or any(tensor.shape != sums.shape for tensor in means)
            or [tuple(tensor.shape) for tensor in others] != [(h,), ()]
            or (moments.centre is None and moments.count)
            or any(tensor.dtype != torch.float64 for tensor in (*means, *others, *moments.rows))
            or counts.keys() != moments.class_sums.keys()
            or min(counts, default=0) < 0
        ):
            raise StatisticsError(f"state contradicts itself: its sums are not float64 of (M, h) = {(m, h)} by class")
        return moments

    def _allocate(self, device: torch.device) -> None:
        m, h = self.num_prompts, self.width
        self.rows = [torch.zeros(h, m - i, h, dtype=torch.float64, device=device) for i in range(m)]
        self.sums, self.third, self.fourth = (t.to(device) for t in (self.sums, self.third, self.fourth))

    def _add_class(self, label: int, number: int, total: Tensor) -> None:
        self.class_counts[label] = self.class_counts.get(label, 0) + number
        known = self.class_sums.get(label)
        self.class_sums[label] = total.clone() if known is None else known + total

    def _merge_fourth(self, other: Moments, shift: Tensor) -> None:
        third, fourth = other.shifted_fourth(shift)
        self.third += third
        self.fourth += fourth

    def shifted_fourth(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Third and fourth sums of ȳ + shift, by expanding the powers."""
        n, s, second = self.count, self.sums.mean(0), self.mixed_second()
        q, d, along = second.trace(), shift.square().sum(), second @ shift
        third = self.third + q * shift + 2 * along + 2 * (s @ shift) * shift + d * s + n * d * shift
        fourth = self.fourth + 4 * shift @ along + n * d * d + 4 * self.third @ shift + 2 * d * q + 4 * d * (s @ shift)
        return third, fourth


def add_by_fold(moments: Sequence[Moments], features: Tensor, labels: Tensor, fold_of: Tensor) -> None:
    """Add images to the moments of their folds: features [M, b, h], labels [b], folds [b] on the CPU."""
    for k, part in enumerate(moments):
        chosen = (fold_of == k).nonzero().flatten()
        if len(chosen):
            part.update(features[:, copied(chosen, features.device)], labels[chosen])


def merged(by_fold: Sequence[Moments], without: int | None = None) -> Moments:
    """Moments of all folds together; optionally without one."""
    total = Moments(by_fold[0].num_prompts, by_fold[0].width)
    for k, part in enumerate(by_fold):
        if k != without:
            total.merge(part)
    return total
