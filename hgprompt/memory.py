"""How many bytes the statistics of a stream take in either representation, and how many there are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hgprompt.moments import Moments

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
