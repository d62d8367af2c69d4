"""How many bytes the statistics of a stream take in either representation, how many there are, and what follows."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hgprompt.errors import StatisticsError
from hgprompt.moments import Moments

Keep = Literal["auto", "features", "moments"]
Representation = Literal["features", "moments"]

_SHARE = 0.8
"""Of the memory available that statistics may take: the network and the solver need some as well."""
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one representation.

    Attributes:
        kept: while the images go by. peak: at most at one time, the solve included: features are joined into one
            tensor, moments are summed over all folds, and over all but one.
    """

    kept: int
    peak: int


def footprint(
    num_prompts: int, width: int, num_images: int, *, num_classes: int, folds: int = 8, itemsize: int = 4
) -> dict[Representation, Footprint]:
    """What `EnsembleStatistics` takes for a stream, in either representation.

    Args:
        num_prompts, width, num_images, num_classes: M, h, N, C. folds: as for `EnsembleStatistics` (8 is the default of
            `fast_ensemble`). itemsize: bytes of one number of the features.
    """
    features = num_prompts * num_images * width * itemsize
    moments = Moments.bytes_for(num_prompts, width, num_classes)
    return {
        "features": Footprint(features, 2 * features),
        "moments": Footprint(folds * moments, (folds + 2) * moments),
    }


class Room:
    """Which representation of a stream to keep, and whether there is room for it.

    Args:
        keep, max_bytes, folds: as for `EnsembleStatistics`.

    Attributes:
        expected: images that will come, about; what is kept is chosen for as many.
    """

    def __init__(self, keep: Keep, max_bytes: int | None, folds: int) -> None:
        self.keep, self.max_bytes, self.folds, self.expected = keep, max_bytes, folds, 0
        self._limit = max_bytes

    def fitting(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        images: int,
        classes: int,
        *,
        device: torch.device,
        held: Callable[[], int],
        keep: Keep | None = None,
    ) -> list[Representation]:
        """Representations that there is room for, the smaller first.

        Args:
            shape: (M, h) of the features. dtype: theirs. images, classes: N and C, as far as is known.
            device: where they are. held: bytes of them that lie there already. Without max_bytes the first call sets
                the limit: what is free on the device then, and what is held.
            keep: None: what this was made with.

        Raises:
            StatisticsError: there is room for none.
        """
        keep, sizes = keep or self.keep, self._sizes(shape, dtype, images, classes)
        if self._limit is None:
            free = available_bytes(device)
            self._limit = None if free is None else free + held()
        kinds = [keep] if keep != "auto" else sorted(sizes, key=lambda kind: sizes[kind].kept)
        fitting = [kind for kind in kinds if self._limit is None or sizes[kind].peak <= self._limit]
        if fitting:
            return fitting
        limit = in_words(self._limit)  # type: ignore[arg-type]
        raise StatisticsError(
            f"{self.plan(shape, dtype, images, classes)}; {limit} can be had. Use fewer images; or fewer prompts "
            "(hgprompt.select_prompts finds the best of a large pool); for features, a dtype of fewer bytes; for "
            "moments, fewer folds; or raise max_bytes, where there is more memory than it says"
        )

    def plan(self, shape: tuple[int, int], dtype: torch.dtype, images: int, classes: int) -> str:
        """What either representation takes, in words."""
        needs = [
            f"{in_words(size.kept)} as {kind} ({in_words(size.peak)} in the solve)"
            for kind, size in self._sizes(shape, dtype, images, classes).items()
            if self.keep in ("auto", kind)
        ]
        count = max(images, self.expected)
        return f"statistics of {shape[0]} prompts and {count} images take {' or '.join(needs)}"

    def _sizes(
        self, shape: tuple[int, int], dtype: torch.dtype, images: int, classes: int
    ) -> dict[Representation, Footprint]:
        count = max(images, self.expected)
        return footprint(*shape, count, num_classes=classes, folds=self.folds, itemsize=dtype.itemsize)


def available_bytes(device: torch.device) -> int | None:
    """Share of a device's memory that statistics may take now; None where the system does not say."""
    if device.type == "cuda":
        return int(_SHARE * free_gpu_bytes(device))
    if device.type != "cpu":
        return None
    free = [number for number in (_memory_of_the_system(), _memory_of_the_container()) if number is not None]
    return int(_SHARE * min(free)) if free else None


def free_gpu_bytes(device: torch.device) -> int:
    """Bytes that the driver has, and those that PyTorch holds and does not use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def in_words(number: int) -> str:
    """A number of bytes, to read: 84 MB."""
    for power, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return f"{number} bytes"


def _memory_of_the_system() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _memory_of_the_container() -> int | None:
    """What a control group leaves: a container sees the whole machine's memory, and is killed at its own limit."""
    for folder, limit, usage in _CONTROL_GROUPS:
        try:
            left = int(Path(folder, limit).read_text()) - int(Path(folder, usage).read_text())
            return max(left + _reclaimable(Path(folder, "memory.stat").read_text()), 0)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return None


def _reclaimable(stat: str) -> int:
    """Cached files count as used, and give way."""
    numbers = dict(line.split()[:2] for line in stat.splitlines() if len(line.split()) >= 2)
    return int(numbers.get("inactive_file", 0))
