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
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hgprompt.backbone import FrozenViT
from hgprompt.errors import DataError, FileFormatError, OptionError, OutputError, warn
from hgprompt.files import (
    MAX_FILE_BYTES,
    bytes_of,
    differences,
    digest_of_tensors,
    make_directory,
    read_safetensors,
    remove_temporaries,
    write_safetensors,
)
from hgprompt.memory import available_bytes
from hgprompt.pass_state import RECORD, Gathering, Saved, content_of, size_of

logger = logging.getLogger(__name__)

SHARE = 0.05
"""Of the time of a pass that checkpoints may take: each waits until it has been paid for."""
_FORMAT, _VERSION = "hgprompt-pass", 2
_VALUES_PER_IMAGE = 1024  # of the pixels that are compared: thousands of images differ somewhere in them
_SECONDS_PER_BYTE = 1 / 200e6  # before the first is written: a slow disk


class PassCheckpoint:
    """The file of one pass, on one rank.

    Args:
        directory: made where it is missing; for one pass alone.
        identity: what makes two passes one and the same, JSON-able (`identity_of`).
        every: seconds between two checkpoints, at least; more where writing takes more than SHARE of the time. At the
            end of the stream one is written in any case.
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
        self._records = array("q")  # RECORD numbers for every batch that is done
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
        self._compare(len(self._records) // RECORD)
        self.done()
        self._labels.append(labels)
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
            records = torch.tensor(self._records, dtype=torch.int64, device="cpu").view(-1, RECORD)
            tensors, count = content_of(gathering)
            metadata = {
                "format": _FORMAT, "version": _VERSION, "identity": self._identity, "num_gradient_images": count,
            }  # fmt: skip
            write_safetensors(self.path, tensors | {"batches": records}, metadata, checksum=True)
            self._written = len(self._records)
        except OutputError as error:
            if not self._warned:
                warn(f"no checkpoint could be written, the pass goes on: {error}")
            self._warned = True
        self._last = self._clock()
        self._seconds_per_byte = (self._last - begin) / size_of(gathering)

    def end_of_stream(self, gathering: Gathering) -> None:
        """The last checkpoint, at any price: what comes after the stream may then fail without costing the pass.

        Raises:
            DataError: batches that the file knows have not come.
        """
        if self._saved is not None:
            raise DataError(
                f"the loader ended after {len(self._records) // RECORD} batches; {self.path} was written after "
                f"{len(self._saved.batches)}: give all the data that it was written for, or delete it to begin again"
            )
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
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:  # no reason to lose the result
            logger.warning("%s is of no more use, and cannot be deleted: %s", self.path, error)

    def _is_paid_for(self, gathering: Gathering) -> bool:
        """Whether a checkpoint would take no more than SHARE of the time since the last one."""
        return SHARE * (self._clock() - self._last) >= self._seconds_per_byte * size_of(gathering)

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

    def _read(self) -> Saved | None:
        if not self.path.exists():
            return None
        # It may be as large as memory has room for, for that is where it came from.
        limit = available_bytes(torch.device("cpu")) or MAX_FILE_BYTES
        tensors, metadata = read_safetensors(self.path, max_bytes=limit, checksum=True, check=self._is_of_this_pass)
        return Saved(self.path, tensors, metadata.get("num_gradient_images"))

    def _is_of_this_pass(self, metadata: Mapping[str, Any]) -> None:
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise FileFormatError(f"{self.path} is no checkpoint of this version's passes; name another checkpoint_dir")
        identity = metadata.get("identity")
        if identity != self._identity:
            changed = differences(identity if isinstance(identity, dict) else {}, self._identity)
            raise OptionError(
                f"{self.path} is the checkpoint of another pass (it differs in {changed}): call it as it was, name "
                "another checkpoint_dir, or delete it to begin again"
            )


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
