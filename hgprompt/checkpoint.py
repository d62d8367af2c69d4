"""Checkpoints of one pass over the images: a file per rank, replaced as a whole.

A resumed pass reads its loader from the start. Batches that are done do not go through the network again: they are
compared with what the file remembers of them, and give back all that a stream can give twice, the labels, the images of
the sample and the draws that chose them. The file holds the rest: statistics as they were kept, features of the sample,
gradients. So it ends with the bits of the undisturbed pass, on the same device and from the same batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from hgprompt.backbone import FrozenViT
from hgprompt.errors import DataError, FileFormatError, HGPromptWarning, OptionError, OutputError, StatisticsError
from hgprompt.files import (
    MAX_FILE_BYTES,
    bytes_of,
    digest_of_tensors,
    make_directory,
    read_safetensors,
    remove_temporaries,
    write_safetensors,
)
from hgprompt.memory import available_bytes
from hgprompt.moments import Moments
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import StopRule

logger = logging.getLogger(__name__)

SHARE = 0.05
"""Of the time of a pass that checkpoints may take: each waits until it has been paid for."""
_FORMAT, _VERSION = "hgprompt-pass", 1
_VALUES_PER_IMAGE = 1024  # of the pixels that are compared: thousands of images differ somewhere in them
_SECONDS_PER_BYTE = 1 / 200e6  # before the first is written: a slow disk
_FIELDS = 3  # of the record of a batch: images, digest of the labels, digest of the pixels


class Gathering(Protocol):
    """A pass in progress: what a checkpoint reads and puts back.

    Attributes:
        prompts: [M, p, d] or [M, L, p, d]. gradients: [folds, *prompts.shape], or None before the first.
        num_gradient_images: in them. sample, rule: None where the pass has none.
    """

    vit: FrozenViT
    prompts: Tensor
    statistics: EnsembleStatistics
    sample: ImageSample | None
    rule: StopRule | None
    gradients: Tensor | None
    num_gradient_images: int


class PassCheckpoint:
    """The file of one pass, on one rank.

    Args:
        directory: made where it is missing; for one pass alone.
        identity: what makes two passes one and the same, JSON-able (`identity_of`).
        every: seconds between two checkpoints, at least; more where writing takes more than SHARE of the time.
        rank, num_ranks: of a process group. Ranks keep files of their own, and write them when they like.
        clock: seconds, for tests.

    Raises:
        OptionError: the directory holds a checkpoint of another pass. FileFormatError: the file is damaged.
        OutputError: the directory cannot be written to.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: Mapping[str, Any],
        *,
        every: float = 300.0,
        rank: int = 0,
        num_ranks: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= every < math.inf:
            raise OptionError(f"checkpoint_every must be a number of seconds from 0 on, got {every}")
        folder = make_directory(directory)
        self.path = folder / _file_name(rank, num_ranks)
        self._identity = json.loads(json.dumps(dict(identity) | {"rank": [rank, num_ranks]}, default=str))
        remove_temporaries(self.path)
        _refuse_other_ranks(folder, num_ranks)
        self._records = array("q")  # _FIELDS numbers for every batch that is done
        self._noted: deque[tuple[int, int, int]] = deque()  # of batches that are read and not done
        self._labels: list[Tensor] = []
        self._saved = self._read()
        self._written = 0
        self._every, self._clock = every, clock
        self._last, self._seconds_per_byte = clock(), _SECONDS_PER_BYTE
        self._warned = False

    def note(self, images: Tensor, labels: Tensor) -> None:
        """Take down a batch that was read: images [B, ...], labels [B]."""
        self._noted.append((len(labels), _digest(labels, labels), _digest(_some_pixels(images), images)))

    def skip(self, images: Tensor, labels: Tensor, gathering: Gathering) -> bool:
        """Whether the oldest batch noted is done already. With the last one that is, the pass is as it was.

        Raises:
            DataError: it is not the batch that was there. FileFormatError: the file contradicts itself.
        """
        if self._saved is None:
            return False
        self._compare(len(self._records) // _FIELDS)
        self.done()
        self._labels.append(labels)
        if gathering.sample is not None:
            gathering.sample.update(images, labels, None)
        if gathering.rule is not None:
            gathering.rule.due(labels)
        if len(self._records) == self._saved.batches.numel():
            self._saved.restore(gathering, torch.cat(self._labels))
            logger.info("%s: %d images are done, going on", self.path, gathering.statistics.num_images)
            self._saved, self._labels, self._written = None, [], len(self._records)
        return True

    def done(self) -> None:
        """The oldest batch noted is part of the statistics now."""
        self._records.extend(self._noted.popleft())

    def due(self, gathering: Gathering) -> bool:
        """Is it time for the next checkpoint?"""
        return self._clock() - self._last >= self._every and self._is_paid_for(gathering)

    def write(self, gathering: Gathering) -> None:
        """Replace the file, where anything was done since. A disk that is full costs a checkpoint, and not the pass:
        the former file stays, and a warning is given once."""
        if len(self._records) == self._written:
            return
        begin = self._clock()
        try:
            write_safetensors(self.path, *self._content(gathering), checksum=True)
            self._written = len(self._records)
        except OutputError as error:
            if not self._warned:
                warnings.warn(f"no checkpoint could be written, the pass goes on: {error}", HGPromptWarning, 3)
            self._warned = True
        self._last = self._clock()
        self._seconds_per_byte = (self._last - begin) / _size(gathering)

    def end_of_stream(self, gathering: Gathering) -> None:
        """The last checkpoint, if it is worth its time: what comes after the stream may then fail without costing the
        pass.

        Raises:
            DataError: batches that the file knows have not come.
        """
        if self._saved is not None:
            raise DataError(
                f"the loader ended after {len(self._records) // _FIELDS} batches; {self.path} was written after "
                f"{len(self._saved.batches)}: give all the data that it was written for, or delete it to begin again"
            )
        if self._is_paid_for(gathering):
            self.write(gathering)

    def rescue(self, gathering: Gathering, *, whole: bool) -> str:
        """Keep what was done before a stream failed; what can be added to the failure's message: where it is.

        Args:
            whole: all parts are of the same batches. If not, the failure came in between, and the former file stands.
        """
        if self._saved is not None:
            return f"; {self.path} is as it was"
        if whole:
            with contextlib.suppress(DataError):  # features that are not finite, which a GPU tells late
                self.write(gathering)
        if self._written == 0:
            return ""
        return f"; what was done is kept in {self.path}: call again with the same data to go on"

    def remove(self) -> None:
        """The pass has a result: its file is of no more use."""
        self.path.unlink(missing_ok=True)

    def _is_paid_for(self, gathering: Gathering) -> bool:
        """Whether a checkpoint would take no more than SHARE of the time since the last one."""
        return SHARE * (self._clock() - self._last) >= self._seconds_per_byte * _size(gathering)

    def _compare(self, batch: int) -> None:
        assert self._saved is not None
        then, now = self._saved.batches[batch].tolist(), list(self._noted[0])
        if then == now:
            return
        if then[0] != now[0]:
            difference = f"it has {now[0]} images and not {then[0]}: the batch size is another"
        elif then[1] != now[1]:
            difference = "its labels are others: other data, or another order"
        else:
            difference = "its labels are the same, its pixels are others: other images, or another transform"
        raise DataError(
            f"batch {batch} of the loader is not the one that {self.path} was written for: {difference}. To go on, "
            "give the same batches in the same order (a seed for the order, no random augmentation); or delete the "
            "file, or name another checkpoint_dir, to begin again"
        )

    def _content(self, gathering: Gathering) -> tuple[dict[str, Tensor | Sequence[Tensor]], dict[str, Any]]:
        tensors: dict[str, Tensor | Sequence[Tensor]] = {}
        kept = gathering.statistics.kept()
        for k, part in enumerate(kept):
            if isinstance(part, Moments) and part.count:
                tensors |= {f"moments.{k}.{name}": value for name, value in _of_moments(part).items()}
        batches = [part for part in kept if isinstance(part, Tensor)]
        if batches:
            tensors["features"] = batches
            tensors["features.sizes"] = torch.tensor([part.shape[1] for part in batches])
        if gathering.sample is not None and len(gathering.sample):
            tensors["sample"] = gathering.sample.features
        if gathering.gradients is not None:
            tensors["gradients"] = gathering.gradients
        if gathering.rule is not None:
            positions, weights, found = gathering.rule.state()
            tensors |= {"looks.images": positions, "looks.weights": weights, "looks.bounds": found}
        tensors["batches"] = torch.tensor(self._records, dtype=torch.int64).view(-1, _FIELDS)
        metadata = {
            "format": _FORMAT, "version": _VERSION, "identity": self._identity,
            "num_gradient_images": gathering.num_gradient_images,
        }  # fmt: skip
        return tensors, metadata

    def _read(self) -> _Saved | None:
        if not self.path.exists():
            return None
        # It may be as large as memory has room for, for that is where it came from.
        limit = available_bytes(torch.device("cpu")) or MAX_FILE_BYTES
        tensors, metadata = read_safetensors(self.path, max_bytes=limit, checksum=True)
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise FileFormatError(f"{self.path} is no checkpoint of this version's passes; name another checkpoint_dir")
        identity = metadata.get("identity")
        if identity != self._identity:
            changed = _changes(identity if isinstance(identity, dict) else {}, self._identity)
            raise OptionError(
                f"{self.path} is the checkpoint of another pass (it differs in {changed}): call it as it was, name "
                "another checkpoint_dir, or delete it to begin again"
            )
        return _Saved(self.path, tensors, metadata.get("num_gradient_images"))


class _Saved:
    """The content of a file, checked when it is asked for: it may come from anywhere."""

    def __init__(self, path: Path, tensors: dict[str, Tensor], num_gradient_images: Any) -> None:
        self._path, self._tensors, self._num_gradient_images = path, tensors, num_gradient_images
        batches = tensors.get("batches")
        rows = len(batches) if batches is not None and batches.ndim else 0
        self.batches = self._take("batches", (rows, _FIELDS), torch.int64)
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
                folds = gathering.statistics.folds
                kept = [self._moments(k, m, h, vit, labels[k::folds]) for k in range(folds)]
            gathering.statistics.restore(labels, kept, vit.dtype)
            if gathering.sample is not None and len(gathering.sample):
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


def identity_of(
    names: Sequence[str], stack: Tensor, vit: FrozenViT, head: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes two passes one and the same, JSON-able.

    Args:
        names, stack: of the prompts, [M, p, d] or [M, L, p, d]. head: a name, or a caller's own: of modules the
            parameters count, of other callables nothing can be known.
        options: what else counts.
    """
    position = [vit.prefix] if vit.patch_position is None else [vit.prefix, vit.patch_position]
    return {
        "prompts": hashlib.sha256(json.dumps([*names, digest_of_tensors([stack])]).encode()).hexdigest(),
        "backbone": vit.fingerprint,
        "position embedding": digest_of_tensors(position),
        "image_size": list(vit.image_size),
        "normalisation": [list(vit.mean), list(vit.std)],
        "dtype": str(vit.dtype).removeprefix("torch."),
        "device": vit.device.type,
        "head": head if isinstance(head, str) else _digest_of_heads(head),
        **options,
    }


def _digest_of_heads(head: Any) -> str:
    heads = list(head) if isinstance(head, (Sequence, nn.ModuleList)) else [head]
    known = [digest_of_tensors(one.state_dict().values()) if isinstance(one, nn.Module) else "" for one in heads]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The names of what differs, and the values where they say something to a reader."""
    words = []
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if old == new:
            continue
        name = key if key in now else ascii(key)[:50]
        plain = all(value is None or isinstance(value, (str, int, float)) for value in (old, new))
        known = f"{name}, {json.dumps(old)} and not {json.dumps(new)}" if plain else name
        words.append(known if len(known) < 100 else name)
    return "; ".join(words)[:1000]


def _file_name(rank: int, num_ranks: int) -> str:
    return "pass.safetensors" if num_ranks == 1 else f"pass-rank-{rank:04d}-of-{num_ranks:04d}.safetensors"


def _refuse_other_ranks(folder: Path, num_ranks: int) -> None:
    """A pass of another number of ranks has dealt the images otherwise."""
    own = {_file_name(rank, num_ranks) for rank in range(num_ranks)}
    others = sorted(p.name for p in folder.glob("pass*.safetensors") if p.name not in own)
    if others:
        raise OptionError(
            f"{folder} holds {others[0]}, the checkpoint of a pass on another number of ranks than {num_ranks}: start "
            "as many as then, name another checkpoint_dir, or delete it to begin again"
        )


def _size(gathering: Gathering) -> int:
    """Bytes of a checkpoint, about; above 0."""
    parts = [] if gathering.sample is None else list(gathering.sample.features)
    parts += [] if gathering.gradients is None else [gathering.gradients]
    return 1 + gathering.statistics.nbytes + sum(part.numel() * part.element_size() for part in parts)


def _of_moments(moments: Moments) -> dict[str, Tensor | Sequence[Tensor]]:
    assert moments.centre is not None
    found: dict[str, Tensor | Sequence[Tensor]] = {
        "centre": moments.centre, "sums": moments.sums, "third": moments.third, "fourth": moments.fourth,
        "classes": torch.tensor(list(moments.class_sums)), "class_sums": list(moments.class_sums.values()),
    }  # fmt: skip
    return found | {f"rows.{i}": row for i, row in enumerate(moments.rows)}


def _own(tensor: Tensor, vit: FrozenViT) -> Tensor:
    """A copy on the pass's device: aligned as all that PyTorch allocates: how a product is summed may hang on it."""
    return tensor.to(vit.device, copy=True)


def _some_pixels(images: Tensor) -> Tensor:
    """About _VALUES_PER_IMAGE of each image, evenly over rows, columns and channels."""
    flat = images.flatten(1)
    step = max(1, flat.shape[1] // _VALUES_PER_IMAGE)
    while math.gcd(step, flat.shape[1]) > 1:  # else whole columns would never be looked at
        step += 1
    return flat[:, ::step]


def _digest(values: Tensor, of: Tensor) -> int:
    """64 bits of a digest of values, and of the dtype and shape of what they are from."""
    digest = hashlib.sha256(f"{of.dtype}{list(of.shape)}".encode())
    digest.update(bytes_of(values))
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
