"""What a pass has gathered, as the tensors of a file, and back.

Only what a stream cannot give twice: statistics as they were kept, features of the sample, gradients, looks at the
weights. What comes back may come from anywhere, and is checked against the pass and the labels that it has read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.errors import FileFormatError, StatisticsError
from hgprompt.moments import Moments
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import StopRule

RECORD = 3
"""Numbers that are remembered of a batch: its images, a digest of their labels, a digest of their pixels."""


class Gathering(Protocol):
    """A pass in progress: what a checkpoint reads and puts back.

    Attributes:
        prompts: [M, p, d] or [M, L, p, d]. gradients: [folds, *prompts.shape], or None before the first.
        num_gradient_images: in them. rule: None where the pass has none.
    """

    vit: FrozenViT
    prompts: Tensor
    statistics: EnsembleStatistics
    sample: ImageSample
    rule: StopRule | None
    gradients: Tensor | None
    num_gradient_images: int


def content_of(gathering: Gathering) -> tuple[dict[str, Tensor | Sequence[Tensor]], int]:
    """What a file must hold of a pass for `Saved.restore`, as it lies in memory; and how many images are in the
    gradients."""
    tensors: dict[str, Tensor | Sequence[Tensor]] = {}
    kept = gathering.statistics.kept()
    for k, part in enumerate(kept):
        if isinstance(part, Moments) and part.count:
            tensors |= {f"moments.{k}.{name}": value for name, value in _of_moments(part).items()}
    batches = [part for part in kept if isinstance(part, Tensor)]
    if batches:
        tensors["features"] = batches
        tensors["features.sizes"] = torch.tensor([part.shape[1] for part in batches], device="cpu")
    if len(gathering.sample):
        tensors["sample"] = gathering.sample.features
    if gathering.gradients is not None:
        tensors["gradients"] = gathering.gradients
    if gathering.rule is not None:
        positions, weights, found = gathering.rule.state()
        tensors |= {"looks.images": positions, "looks.weights": weights, "looks.bounds": found}
    return tensors, gathering.num_gradient_images


def size_of(gathering: Gathering) -> int:
    """Bytes of a checkpoint, about; above 0."""
    gradients = [] if gathering.gradients is None else [gathering.gradients]
    parts = [*gathering.sample.features, *gradients]
    return 1 + gathering.statistics.nbytes + sum(part.numel() * part.element_size() for part in parts)


class Saved:
    """The content of a file, checked when it is asked for: it may come from anywhere."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], num_gradient_images: Any) -> None:
        self._path, self._tensors, self._num_gradient_images = path, tensors, num_gradient_images
        batches = tensors.get("batches")
        rows = len(batches) if batches is not None and batches.ndim else 0
        self.batches = self._take("batches", (rows, RECORD), torch.int64)
        if rows == 0 or int(self.batches[:, 0].min()) < 1:
            self._refuse("it knows of no batches")

    def restore(self, gathering: Gathering, labels: Tensor) -> None:
        """Put all into a pass that has read the labels [N] of the batches that are done; FileFormatError."""
        vit, shape = gathering.vit, tuple(gathering.prompts.shape)
        m, h = shape[0], vit.width
        try:
            if "features" in self._tensors:
                kept: list[Tensor] | list[Moments] = self._features(m, h, vit, len(labels))
            else:
                fold_of = gathering.statistics.next_folds(len(labels))  # as they were dealt: they are empty still
                folds = range(gathering.statistics.folds)
                kept = [self._moments(k, m, h, vit, labels[fold_of == k]) for k in folds]
            gathering.statistics.restore(labels, kept, vit.dtype)
            if len(gathering.sample):
                sample = self._take("sample", (len(gathering.sample) * m * h,), vit.dtype)
                gathering.sample.restore([_own(part.view(m, h), vit) for part in sample.split(m * h)])
        except StatisticsError as error:
            self._refuse(str(error))
        if "gradients" in self._tensors:
            precise = torch.promote_types(vit.dtype, torch.float32)
            gradients = self._take("gradients", (gathering.statistics.folds, *shape), precise)
            gathering.gradients = _own(gradients, vit)
        count = self._num_gradient_images
        if type(count) is not int or not 0 <= count <= len(labels) or (count > 0 and gathering.gradients is None):
            self._refuse(f"its gradients are of {count!r} images"[:100])
        gathering.num_gradient_images = count
        if gathering.rule is not None:
            looks = len(self._tensors["looks.images"]) if self._tensors.get("looks.images", labels).ndim else 0
            positions = self._take("looks.images", (looks,), torch.int64)
            weights = self._take("looks.weights", (looks, m if looks else 0), torch.float64)
            found = self._take("looks.bounds", (looks,), torch.float64, finite=False)
            if bool(found.isnan().any()) or bool((positions > len(labels)).any()):
                self._refuse("its looks at the weights are none")
            gathering.rule.restore(positions, weights.clone(), found)
        if self._tensors:
            self._refuse(f"it holds {ascii(list(self._tensors))[:100]}, which this pass has no use for")

    def _features(self, m: int, h: int, vit: FrozenViT, num_images: int) -> list[Tensor]:
        flat = self._take("features", (m * num_images * h,), vit.dtype)
        given = self._tensors.get("features.sizes")
        sizes = self._take("features.sizes", (0 if given is None or not given.ndim else len(given),), torch.int64)
        if int(sizes.min() if len(sizes) else 0) < 1 or int(sizes.max()) > num_images or int(sizes.sum()) != num_images:
            self._refuse("its features are not of the images that it was written for")
        parts = flat.split([m * b * h for b in sizes.tolist()])
        return [_own(part.view(m, b, h), vit) for part, b in zip(parts, sizes.tolist(), strict=True)]

    def _moments(self, k: int, m: int, h: int, vit: FrozenViT, labels: Tensor) -> Moments:
        """Moments of fold k, whose images have these labels."""
        moments = Moments(m, h)
        if len(labels) == 0:
            return moments
        present, counts = labels.unique(return_counts=True)
        shapes = {"centre": (m, h), "sums": (m, h), "third": (h,), "fourth": ()}
        shapes |= {f"rows.{i}": (h, m - i, h) for i in range(m)} | {"class_sums": (len(present) * m * h,)}
        found = {name: self._take(f"moments.{k}.{name}", shape, torch.float64) for name, shape in shapes.items()}
        order = self._take(f"moments.{k}.classes", (len(present),), torch.int64)
        if not torch.equal(order.sort().values, present):
            self._refuse(f"the classes of fold {k} are not those of its images")
        moments.count = len(labels)
        moments.centre, moments.sums, moments.third, moments.fourth = (
            _own(found[name], vit) for name in ("centre", "sums", "third", "fourth")
        )
        moments.rows = [_own(found[f"rows.{i}"], vit) for i in range(m)]
        count_of = dict(zip(present.tolist(), counts.tolist(), strict=True))
        sums = found["class_sums"].view(-1, m, h).unbind(0)
        for label, total in zip(order.tolist(), sums, strict=True):
            moments.class_counts[label], moments.class_sums[label] = count_of[label], _own(total, vit)
        return moments

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = True) -> Tensor:
        """A tensor of this name, shape and dtype, which is no longer here then."""
        value = self._tensors.pop(name, None)
        if value is None or tuple(value.shape) != shape or value.dtype != dtype:
            found = "is missing" if value is None else f"is {list(value.shape)} {value.dtype}"
            self._refuse(f"{name} {found}, expected {list(shape)} {dtype}")
        if finite and value.is_floating_point() and not bool(value.isfinite().all()):
            self._refuse(f"{name} holds NaN or infinity")
        return value

    def _refuse(self, reason: str) -> NoReturn:
        raise FileFormatError(f"{self._path} is no whole checkpoint ({reason}): delete it to begin again")


def _of_moments(moments: Moments) -> dict[str, Tensor | Sequence[Tensor]]:
    assert moments.centre is not None
    found: dict[str, Tensor | Sequence[Tensor]] = {
        "centre": moments.centre, "sums": moments.sums, "third": moments.third, "fourth": moments.fourth,
        "classes": torch.tensor(list(moments.class_sums), device="cpu"),
        "class_sums": list(moments.class_sums.values()),
    }  # fmt: skip
    return found | {f"rows.{i}": row for i, row in enumerate(moments.rows)}


def _own(tensor: Tensor, vit: FrozenViT) -> Tensor:
    """A copy on the pass's device: aligned as all that PyTorch allocates: how a product is summed may hang on it."""
    return tensor.to(vit.device, copy=True)
