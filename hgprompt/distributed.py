"""The collectives that hgprompt needs, over one torch.distributed group: tensors in, tensors out, nothing pickled.

Every rank calls the same collectives in the same order. What keeps that true when something goes wrong is
`Ranks.together`: work that a rank does on its own, at the end of which all ranks say whether it went well. A collective
that fails, because a rank died or the group's timeout has passed, is a `DistributedError`.

What must be the same to the last bit on every rank is computed on the first rank and broadcast: floating point sums
differ between processors, and so do libraries.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hgprompt.errors import DistributedError, OptionError

if dist.is_available():
    # Its functions' default argument is the group there is when it is imported, as timm and the compiler import it.
    # Imported after init_process_group it keeps that group beyond destroy_process_group, and a thread of the group,
    # letting go of its last tensor while Python ends, then aborts the process now and then. Now there is none to keep.
    import torch.distributed.nn

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 28
"""At most so much travels in one broadcast: backends keep copies of what they send."""
_LONGEST_MESSAGE = 2000
_RESUME = (
    "start the job again (torchrun --max-restarts does so by itself); with checkpoint_dir it goes on from where it was"
)


class Ranks:
    """The processes of a torch.distributed group, or this process alone.

    Collectives run on the device of the group's backend (gloo: CPU; NCCL: a GPU), wherever the tensors are. The
    default group, its settings and the random numbers' state are left alone.

    Args:
        group: a process group that this process belongs to; None: this process alone, whose collectives give back what
            they were given.
        device: where the work is: for NCCL, the GPU to use. None: the GPU that the group is bound to, or the current.

    Attributes:
        rank, world: of the group. handed: bytes that this rank handed to collectives, by stage; what travels over the
            wires is up to the backend (a ring's sum: 2 (W-1)/W times as many).

    Raises:
        DistributedError: torch.distributed is not initialised, or this process is no member of the group.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group, self.rank, self.world = group, 0, 1
        self.stage = "the start"
        self.handed: dict[str, int] = {}
        self._told: Exception | None = None
        self._device = torch.device("cpu")
        if group is None:
            return
        if not dist.is_available() or not dist.is_initialized():
            raise DistributedError("process_group needs torch.distributed: call init_process_group first")
        try:
            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DistributedError(f"process_group is no torch.distributed group: {error}") from error
        if self.rank < 0:
            raise DistributedError("this process is no member of process_group: call with a group of its own, or None")
        self._device = _device_of(group, device)

    @property
    def alone(self) -> bool:
        """Whether there is no group."""
        return self.group is None

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which decides what all must agree on."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self, stage: str) -> Iterator[None]:
        """Work that every rank does on its own; at the end all say whether it went well.

        Where it did not, the failing rank's own exception goes on there.

        Raises:
            DistributedError: it failed on another rank; the message carries that rank's.
        """
        self.stage = stage
        try:
            yield
        except DistributedError:  # of a collective: the group is of no use any more, or all have heard
            raise
        except Exception as error:
            if self._told is not None and self._told in (error, error.__cause__):  # by such a block within this one
                raise
            self._told = error
            try:
                self._tell(f"{type(error).__name__}: {error}")
            except DistributedError as lost:
                logger.warning("other ranks could not be told of the error: %s", lost)
            raise
        self._tell("")

    def agree(self, options: Mapping[str, Any]) -> None:
        """Make sure that all ranks were called with the same options (JSON-able).

        Raises:
            DistributedError: they were not; on every rank, naming the first rank that differs and in what.
        """
        self.stage = "comparing the ranks' options"
        mine = json.loads(json.dumps(options))
        for rank, theirs in enumerate(everyone := self.gather_json(mine)):
            reference = everyone[0]
            differing = [key for key in reference | theirs if reference.get(key) != theirs.get(key)]
            if differing:
                what = "; ".join(f"{k}: {reference.get(k)!r:.80} and {theirs.get(k)!r:.80}" for k in differing)
                raise DistributedError(
                    f"rank 0 and rank {rank} were not called alike ({what}): every rank must pass the same prompts, "
                    "backbone and options"
                )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, which have one shape and dtype; on the tensor's device. In place where the
        group's device is the tensor's and it is contiguous."""
        if self.alone:
            return tensor
        here = tensor.to(self._device).contiguous()
        with self._collective(here.nbytes):
            dist.all_reduce(here, group=self.group)
        return here.to(tensor.device)

    def gather(self, tensor: Tensor, dim: int = 0) -> list[Tensor]:
        """The tensors of all ranks, in rank order, on this tensor's device; they may differ in size along `dim`.

        A rank that has nothing passes a tensor of size 0 along `dim`, of any shape and dtype otherwise.
        """
        if self.alone:
            return [tensor]
        kinds = [(tuple(shape), getattr(torch, dtype)) for shape, dtype in self.gather_json(_kind(tensor))]
        full, dtype = next((kind for kind in kinds if 0 not in kind[0]), kinds[0])
        parts = []
        for rank, (shape, _) in enumerate(kinds):
            if 0 in shape:
                parts.append(torch.zeros((*full[:dim], 0, *full[dim + 1 :]), dtype=dtype, device=tensor.device))
            else:
                parts.append(self._from(rank, tensor if rank == self.rank else tensor.new_empty(shape, dtype=dtype)))
        return parts

    def gather_json(self, value: Any) -> list[Any]:
        """A small JSON-able value of every rank, in rank order."""
        if self.alone:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = self._gather_equal(torch.tensor([len(text)], device="cpu")).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device="cpu")
        padded[: len(text)] = text
        texts = self._gather_equal(padded)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def broadcast(self, tensors: Mapping[str, Tensor] | None, record: Any = None) -> tuple[dict[str, Tensor], Any]:
        """The first rank's tensors and a small JSON-able record, with the same bits on every rank.

        What the other ranks pass is not looked at. Tensors come back on the CPU there, and as they are on the first.
        """
        if self.alone:
            return dict(tensors or {}), record
        tensors = dict(tensors or {}) if self.first else {}
        layout = {name: _kind(tensor) for name, tensor in tensors.items()}
        layout, record = self.gather_json([layout, record] if self.first else None)[0]
        result = {}
        for name, (shape, dtype) in layout.items():
            mine = tensors[name] if self.first else torch.empty(shape, dtype=getattr(torch, dtype), device="cpu")
            result[name] = self._from(0, mine)
        return result, record

    def decided(self, value: Any) -> Any:
        """The first rank's small JSON-able value, on every rank."""
        return self.broadcast(None, value)[1]

    def rounds(self, batches: Iterator[Tensor], stage: str) -> Iterator[Tensor]:
        """One tensor of every rank at a time, joined along the first dimension, until the last rank has no more."""
        if self.alone:
            yield from batches
            return
        while True:
            with self.together(stage):
                batch = next(batches, None)
            parts = self.gather_json(None if batch is None else batch.tolist())
            if all(part is None for part in parts):
                return
            yield torch.tensor([n for part in parts for n in part or []], dtype=torch.int64, device="cpu")

    def _tell(self, message: str) -> None:
        if self.alone:
            return
        messages = self.gather_json(message[:_LONGEST_MESSAGE])
        if not message and any(messages):
            rank, failure = next((rank, text) for rank, text in enumerate(messages) if text)
            raise DistributedError(f"rank {rank} of {self.world} failed while {self.stage}: {failure}")

    def _from(self, rank: int, tensor: Tensor) -> Tensor:
        """One rank's tensor, whose shape and dtype are those of the one passed elsewhere."""
        here = tensor.detach().to(self._device).contiguous()
        flat = here.view(-1)
        with self._collective(here.nbytes if rank == self.rank else 0):
            for part in flat.split(max(1, _CHUNK_BYTES // max(1, here.element_size()))):
                dist.broadcast(part, group_src=rank, group=self.group)
        return tensor if rank == self.rank else here.to(tensor.device)

    def _gather_equal(self, tensor: Tensor) -> Tensor:
        """Tensors of one shape of all ranks, stacked, on the CPU."""
        here = tensor.to(self._device)
        parts = [torch.empty_like(here) for _ in range(self.world)]
        with self._collective(here.nbytes):
            dist.all_gather(parts, here, group=self.group)
        return torch.stack(parts).cpu()

    @contextlib.contextmanager
    def _collective(self, num_bytes: int) -> Iterator[None]:
        self.handed[self.stage] = self.handed.get(self.stage, 0) + num_bytes
        try:
            yield
        except RuntimeError as error:  # what all backends raise: a peer is gone, or the timeout has passed
            raise DistributedError(
                f"rank {self.rank} of {self.world} lost touch with the others while {self.stage} ({error}): a rank "
                f"died, or did not come within the group's timeout; {_RESUME}"
            ) from error


def slices(count: int, world: int) -> list[slice]:
    """The shares of `count` things for `world` ranks, as equal as can be; some are empty where there are too few."""
    ends = [0, *itertools.accumulate(count // world + (rank < count % world) for rank in range(world))]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _kind(tensor: Tensor) -> list[Any]:
    """Shape and dtype, JSON-able."""
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def default_group() -> Any:
    """The process group of the whole job.

    Raises:
        DistributedError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise DistributedError("there is no torch.distributed process group: call init_process_group first")
    return dist.group.WORLD


def place_in_job() -> tuple[int, int]:
    """Rank and number of the processes of a job, as torchrun says in RANK and WORLD_SIZE; (0, 1) where nothing says it.

    Raises:
        OptionError: they say something else than a rank.
    """
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise OptionError(f"RANK {rank!r} of WORLD_SIZE {world!r} is no share of the work: unset both")
    return int(rank), int(world)


def meeting_place() -> dict[str, Any]:
    """Arguments for `init_process_group` under torchrun with --max-restarts: where the processes of this attempt meet.

    torchrun keeps one store for all attempts, in which those of a restart would find the addresses of the dead, and
    wait for them; so each attempt has a part of it for itself. Empty where torchrun keeps none.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = dist.PrefixStore(f"hgprompt/{attempt}", store)
    return {"store": place, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


def _device_of(group: Any, wanted: torch.device | None) -> torch.device:
    """Where the group's collectives take tensors: of the same kind on all ranks, so the group alone decides it."""
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if backends.get("cuda", "gloo") == "gloo" or not torch.cuda.is_available():
        return torch.device("cpu")
    if wanted is not None and wanted.type == "cuda" and wanted.index is not None:
        return wanted
    bound = getattr(group, "bound_device_id", None)
    return bound if bound is not None else torch.device("cuda", torch.cuda.current_device())
