"""What a batch of features and labels must be before it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from hgprompt.errors import DataError


class FiniteCheck:
    """Are features finite? On a CPU the answer comes at once; on a GPU, two batches later, so that the host never waits
    for the batch that is being computed.

    Attributes:
        numbers: of the prompts, for the message; None: 0 … M - 1.
    """

    def __init__(self) -> None:
        self.numbers: Sequence[int] | None = None
        self._pending: deque[tuple[torch.cuda.Event, Tensor, int]] = deque()

    def check(self, features: Tensor, position: int) -> None:
        """Note one batch [M, B, h], which comes after image number `position`; DataError for it or an earlier one."""
        finite = features.flatten(1).isfinite().all(1)
        if not features.is_cuda:
            self._require(finite, position)
            return
        with torch.cuda.device(features.device):
            host = torch.empty(finite.shape, dtype=torch.bool, device="cpu", pin_memory=True)
            host.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((event, host, position))
        self._finish(2)

    def finish(self) -> None:
        """Wait for all that was noted; DataError as for `check`."""
        self._finish(0)

    def _finish(self, left: int) -> None:
        while len(self._pending) > left:
            event, finite, position = self._pending[0]
            event.synchronize()
            self._require(finite, position)  # what is not finite stays the answer, however often it is asked for
            self._pending.popleft()

    def _require(self, finite: Tensor, position: int) -> None:
        if not bool(finite.all()):
            bad = torch.nonzero(~finite).flatten().tolist()
            if self.numbers is not None:
                bad = [self.numbers[i] for i in bad]
            raise DataError(
                f"features of prompt {bad[0]} are not finite (all: {bad[:5]}; batch after image {position}): "
                "look for NaN or overflow in the images, the prompts or the compute dtype"
            )


def check_labels(labels: Tensor, expected: int) -> Tensor:
    """Labels [B] as int64 on the CPU, or DataError."""
    if not isinstance(labels, Tensor):
        raise DataError(f"labels must be a torch.Tensor [B] of integers, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"labels must be integer class indices, got {labels.dtype}")
    if labels.ndim != 1 or len(labels) != expected:
        raise DataError(f"labels must be [{expected}], one per image, got {list(labels.shape)}")
    labels = labels.detach().to("cpu", torch.int64, copy=True)  # a loader may use its memory for the next batch
    if expected and int(labels.min()) < 0:
        raise DataError(f"labels must be class indices from 0 on, got {int(labels.min())}: drop unlabelled images")
    return labels
