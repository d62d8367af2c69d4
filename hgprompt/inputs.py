"""What comes in: prompts, a backbone and a loader of a caller's own making, checked before any work is done."""

from __future__ import annotations

import copy
import hashlib
import itertools
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hgprompt.arguments import check_place
from hgprompt.backbone import FrozenViT
from hgprompt.batch_checks import check_labels
from hgprompt.bundled import load_backbone
from hgprompt.distributed import Ranks
from hgprompt.encoder import check_prompts
from hgprompt.errors import BackboneError, DataError, DistributedError, HGPromptError, warn
from hgprompt.kernels.compiler import copied
from hgprompt.pool import PromptPool
from hgprompt.workers import end_workers, failure_in_words, of_a_worker

_FAR = 30.0  # standard deviations from the mean, for a pixel

Prompts = PromptPool | Mapping[str, Tensor] | Sequence[Tensor] | Tensor


def resolve(
    prompts: Prompts,
    backbone: nn.Module | str | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[PromptPool, Tensor, FrozenViT]:
    check_place(device, dtype)
    pool = prompts if isinstance(prompts, PromptPool) else PromptPool(prompts)
    given = backbone is not None
    if backbone is None:
        if pool.backbone is None:
            raise BackboneError("these prompts name no backbone: pass backbone=, a timm model, a FrozenViT or a name")
        backbone = pool.backbone.name
    if isinstance(backbone, str):
        options: dict[str, Any] = {} if pool.backbone is None else {"img_size": pool.backbone.image_size}
        try:
            vit = load_backbone(backbone, device=device, dtype=dtype, **options)
        except BackboneError as error:
            if given:
                raise
            raise BackboneError(
                f"the backbone that the prompts name could not be loaded ({error}): pass backbone=, the network that "
                "they were tuned with"
            ) from error
        if pool.backbone is not None:
            vit.set_preprocessing(
                mean=pool.backbone.mean, std=pool.backbone.std, interpolation=pool.backbone.interpolation
            )
    elif isinstance(backbone, FrozenViT):
        vit = backbone
        elsewhere = device is not None and not _is_on(torch.device(device), vit.device)
        if elsewhere or dtype not in (None, vit.dtype):
            vit = copy.deepcopy(vit).to(device=device, dtype=dtype)
    else:
        vit = FrozenViT.from_timm(backbone, device=device, dtype=dtype)
    pool.check_backbone(vit.info)
    stack = pool.stack()
    check_prompts(vit, stack)
    return pool, stack, vit


def gpu_of(device: torch.device | str | None, backbone: nn.Module | str | None) -> torch.device | None:
    """Where the work will be, as far as the arguments say; what is no device is for `resolve` to refuse."""
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError):
            return None
    weights = itertools.chain(backbone.parameters(), backbone.buffers()) if isinstance(backbone, nn.Module) else ()
    return next((tensor.device for tensor in weights), None)


def digest(pool: PromptPool) -> str:
    """SHA-256 of the names, in order, and the numbers of prompts."""
    found = hashlib.sha256()
    for name, prompt in pool.items():
        found.update(f"{name!r} {list(prompt.shape)} {prompt.dtype}\n".encode())
        found.update(prompt.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read(
    loader: Iterable[Any], vit: FrozenViT, note: Callable[[Tensor, Tensor], None] | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Checked batches of a loader, each on its way to a GPU while the one before is computed.

    Args:
        note: called with the images and labels of each batch, in order, before it goes anywhere.

    Yields:
        images [B, 3, H, W] and labels [B], int64 on the CPU.

    Raises:
        DataError: what the loader gives cannot be used, or it failed (its own exception is the cause).
    """
    try:
        iterator = iter(loader)
    except TypeError as error:
        raise DataError(f"loader must be an iterable of (images, labels), got {type(loader).__name__}") from error
    try:
        batches = _batches(iterator, vit, note, has_workers=getattr(loader, "num_workers", 0) > 0)
        yield from _ahead(batches, vit.device)
    finally:
        end_workers(loader, iterator)


def _batches(
    iterator: Iterator[Any], vit: FrozenViT, note: Callable[[Tensor, Tensor], None] | None, *, has_workers: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked (images, labels [int64, CPU]) of the loader; its own failures as DataError."""
    position, floating = 0, None
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except HGPromptError as error:
            raise of_a_worker(error) from error.__cause__
        except Exception as error:
            reason = failure_in_words(error, has_workers=has_workers)
            raise DataError(f"the loader failed after {position} batches: {reason}") from error
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            kind = (
                f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
            )
            raise DataError(f"batch {position} of the loader is a {kind}; it must be a pair (images, labels)")
        try:
            images, labels = _check_batch(vit, *batch)
        except DataError as error:
            raise DataError(f"batch {position} of the loader: {error}") from error
        floating = images.is_floating_point() if floating is None else floating
        if images.is_floating_point() != floating:
            raise DataError(
                f"batch {position} of the loader is {images.dtype}: uint8 and normalised floats cannot both be right"
            )
        if position == 0 and floating:
            _warn_of_raw_pixels(vit, images)
        position += 1
        if len(labels) == 0:  # a collate function that drops bad images may leave none
            continue
        if note is not None:
            note(images, labels)
        yield images, labels


def _warn_of_raw_pixels(vit: FrozenViT, images: Tensor) -> None:
    """Floats are taken as they are. Normalised ones lie on both sides of the mean, and not far from it."""
    low, high = (float(value) for value in images.detach().aminmax()) if images.numel() else (-1.0, 1.0)
    of_mean = min(vit.mean)
    if high > _FAR or (low >= 0 and high <= 1 and of_mean > 0 and high > 0):
        warn(
            f"images are floating point from {low:.3g} to {high:.3g}, which normalised ones are not: give uint8, or "
            f"normalise images in 0 … 1 with the backbone's mean {vit.mean} and std {vit.std}"
        )


def same_batches(batches: Iterator[tuple[Tensor, Tensor]], ranks: Ranks, stage: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of which every rank reads the same; made sure of by a checksum, one batch at a time.

    Raises:
        DistributedError: a rank read something else, or as many batches as others; on every rank.
    """
    for number in itertools.count():
        with ranks.together(stage):
            batch = next(batches, None)
        mine = None if batch is None else [len(batch[1]), _checksum(*batch)]
        everyone = ranks.gather_json(mine)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                raise DistributedError(
                    f"batch {number} of rank {rank} is not that of rank 0 ([images, checksum]: {theirs} and "
                    f"{everyone[0]}; null: no more): with shard='prompts' every rank must read the same images in the "
                    "same order, without random augmentation"
                )
        if batch is None:
            return
        yield batch


def _checksum(images: Tensor, labels: Tensor) -> int:
    """Of a batch: a few hundred pixels of it, wherever they lie, and its labels."""
    flat = images.detach().reshape(-1)
    some = flat[:: max(1, len(flat) // 509)].cpu().contiguous()
    return zlib.crc32(labels.numpy().tobytes(), zlib.crc32(some.view(torch.uint8).numpy().tobytes()))


def _ahead(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; for a GPU, each is on its way there (through pinned memory, on a stream of its own) while the
    one before is computed. A loader may fill the memory of one batch with the next: what it is asked for ahead of time
    is a copy by then, and where images lie on a GPU already, nothing is asked for ahead of time."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    waiting: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    def arrived(images: Tensor, labels: Tensor, event: torch.cuda.Event) -> tuple[Tensor, Tensor]:
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        images.record_stream(current)
        return images, labels

    for images, labels in batches:
        there = images.device.type != "cpu"
        ahead = None
        if not there:
            with torch.cuda.stream(copies):
                ahead = copied(images, device), labels, copies.record_event()
        if waiting is not None:
            yield arrived(*waiting)
        waiting = ahead
        if there:
            yield images, labels
    if waiting is not None:
        yield arrived(*waiting)


def num_batches(loader: Iterable[Any]) -> int | None:
    """How many batches a loader has; None where it does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # Lightning's and torchdata's way to have no length
        return None


def images_in(loader: Iterable[Any], batches: int, first: int) -> int:
    """About how many images a loader of so many batches has.

    Args:
        first: images of its first batch, which may have shrunk: by those that could not be read, or by a collate
            function of a caller's own. So of a DataLoader, its batch size counts.
    """
    stated = loader.batch_size if isinstance(loader, DataLoader) else None
    return first if batches == 1 else batches * max(first, stated or 0)


def _is_on(wanted: torch.device, device: torch.device) -> bool:
    """Whether a device is the one that was asked for; "cuda" is any GPU."""
    return wanted.type == device.type and wanted.index in (None, device.index)


def _check_batch(vit: FrozenViT, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    vit.check_images(images)
    labels = check_labels(labels, len(images))
    # On a GPU the host would wait for all that is queued there; the features of such images are not finite either, and
    # that is noticed without waiting (`FiniteCheck`).
    if images.is_floating_point() and not images.is_cuda and not bool(images.isfinite().all()):
        bad = torch.nonzero(~images.flatten(1).isfinite().all(1)).flatten().tolist()
        raise DataError(f"images {bad[:8]} hold NaN or infinity")
    return images.detach(), labels
