"""encode: images × prompts → features, differentiable in the prompts, in micro-batches.

What runs one micro-batch is `hgprompt.network`, on the operations that suit the device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hgprompt import network, operations
from hgprompt.arguments import whole
from hgprompt.backbone import FrozenViT
from hgprompt.errors import BackboneError, DataError, DeviceMemoryError, OptionError, PromptError
from hgprompt.memory import free_gpu_bytes
from hgprompt.operations import Impl, Operations

logger = logging.getLogger(__name__)

# Tokens in one micro-batch. On a CPU, the GEMMs are at their full rate long before, and activations of this size
# (a few MB a layer) still profit from the caches. On a GPU at most so many, and fewer where memory is short.
_TOKENS_PER_MICRO_BATCH = {"cpu": 2048, "cuda": 131072}
_SHARE_OF_FREE_MEMORY = 0.6

# loss(features [m, b, h], prompt_indices, image_indices) -> [m], summed over the images
PullBackLoss = Callable[[Tensor, slice, slice], Tensor]
_Row = TypeVar("_Row")
_Pulled = tuple[slice, Tensor, Tensor, Tensor]  # prompts, and their features, losses and gradients


class MicroBatch:
    """Image–prompt pairs in the network at one time, over many calls for one backbone: what was found to suit it stays,
    and what a GPU had no memory for is not tried again.

    Args:
        size: at most; None: sized for the device.

    Raises:
        OptionError: a size below 1.
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and whole("micro_batch", size) < 1:
            raise OptionError(f"micro_batch must be at least 1, got {size}")
        self.size = size
        self._halved: int | None = None
        self._suitable: dict[tuple[torch.device, torch.dtype, int, bool], int] = {}

    @classmethod
    def of(cls, micro_batch: int | MicroBatch | None) -> MicroBatch:
        """What `encode` was given, in one form."""
        return micro_batch if isinstance(micro_batch, MicroBatch) else cls(micro_batch)

    def resolve(self, backbone: FrozenViT, prompts: Tensor, *, backward: bool) -> int:
        """The number for a call: the caller's, or what suits the device and its free memory; or what was left of it."""
        size = self.size
        if size is None:
            tokens = backbone.num_image_tokens + prompts.shape[-2]
            key = backbone.device, backbone.dtype, tokens, backward
            if key in self._suitable:
                size = self._suitable[key]
            else:
                size = self._find(backbone, tokens, backward)
                if not torch.compiler.is_compiling():
                    # Once: all sums of a pass are of one size, and the driver is not asked again.
                    self._suitable[key] = size
        return size if self._halved is None else min(size, self._halved)

    @staticmethod
    def _find(backbone: FrozenViT, tokens: int, backward: bool) -> int:
        at_once = _TOKENS_PER_MICRO_BATCH.get(backbone.device.type, 2048)
        # Inside a graph of torch.compile the driver cannot be asked.
        if backbone.device.type == "cuda" and not torch.compiler.is_compiling():
            free = _SHARE_OF_FREE_MEMORY * free_gpu_bytes(backbone.device)
            fits = max(1, int(free / bytes_per_token(backbone, tokens, backward=backward)))
            # A power of two: a little more or less free memory than the last time gives the same sums.
            at_once = min(at_once, 1 << (fits.bit_length() - 1))
        return max(1, at_once // tokens)

    def halve(self, pairs: int, device: torch.device, reason: str) -> int:
        """Half of the pairs that were too many, from now on."""
        level = logging.WARNING if self._halved is None else logging.INFO
        self._halved = pairs // 2
        logger.log(
            level, "no memory on %s for %d image-prompt pairs at one time, going on with %d (%s)",
            device, pairs, self._halved, reason.splitlines()[0],
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of the former sizes would stay, and fit nothing
        return self._halved


def encode(
    backbone: FrozenViT,
    prompts: Tensor,
    images: Tensor,
    *,
    micro_batch: int | MicroBatch | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Features of every image under every prompt (Eq. 3).

    Args:
        backbone: the packed backbone; see `FrozenViT.from_timm`.
        prompts: [M, p, d] (inserted once, after the position embeddings) or deep [M, L, p, d] (block i sees
            prompts[:, i] in place of what the block before made of its prompt tokens). p may be 0. Any float dtype
            and device: they are cast to the backbone's.
        images: [B, 3, H, W], floating point and normalised, or uint8; or [M, B, 3, H, W], to each prompt its own.
        micro_batch: image–prompt pairs that are in the network at one time; None: sized for the device. Memory
            grows with it and not with M or B. Where gradients are needed and M·B is larger, each micro-batch is
            computed again in the backward pass. Where a GPU's memory runs out on the way forward, it is halved and the
            call goes on; on the way back it cannot be, for the graph is the caller's by then: `pull_back` can. Under
            torch.compile nothing asks what is free: where a GPU's memory is short, give a number.
        impl: "auto" picks what suits the device; "reference" is plain PyTorch, "triton" this project's kernels (a GPU
            from sm_80 on), "sdpa" and "xformers" the kernels with another attention.

    Returns:
        [M, B, h], in the backbone's dtype, whatever autocast state the caller is in.

    Raises:
        PromptError, DataError: shapes or dtypes do not fit the backbone. BackboneError: it is not a FrozenViT.
        OptionError: a micro_batch below 1, or an impl that cannot run here. DeviceMemoryError: one pair does not fit.
    """
    check_prompts(backbone, prompts)
    num_images = _check_images(backbone, images, len(prompts))
    ops = operations.select(backbone, impl)
    needs_grad = torch.is_grad_enabled() and prompts.requires_grad
    limit = MicroBatch.of(micro_batch)
    size = limit.resolve(backbone, prompts, backward=needs_grad)
    with _no_autocast(backbone):
        prompts = prompts.to(device=backbone.device, dtype=backbone.dtype)

        def row(image_slice: slice, prompt_slices: list[slice], recompute: bool) -> Tensor:
            parts = []
            for s, tokens in _embedded(backbone, images, image_slice, prompt_slices, ops):
                arguments = (backbone, tokens, prompts[s], ops)
                if recompute and needs_grad:
                    parts.append(
                        checkpoint(network.features, *arguments, use_reentrant=False, preserve_rng_state=False)
                    )
                else:
                    parts.append(network.features(*arguments))
            return torch.cat(parts)

        rows = list(_rows(row, len(prompts), num_images, size, limit, backbone.device))
        if not rows:
            return prompts.new_zeros(len(prompts), num_images, backbone.width)
        return torch.cat(rows, dim=1)


def pull_back(
    backbone: FrozenViT,
    prompts: Tensor,
    images: Tensor,
    loss: PullBackLoss,
    *,
    micro_batch: int | MicroBatch | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, losses and the losses' gradients in the prompts, each micro-batch forward and backward at once.

    Memory does not grow with M or B, and nothing is computed twice. Where a GPU's memory runs out, the micro-batch is
    halved, and what it had begun is thrown away whole: the loss may be asked for the same images again.

    Args:
        backbone, prompts, images, micro_batch, impl: as for `encode`.
        loss: loss(features [m, b, h], prompt indices, image indices) → [m], the sum over those images.

    Returns:
        features [M, B, h] in the backbone's dtype, losses [M] and gradients (shape of prompts) in at least float32.

    Raises:
        PromptError, DataError, BackboneError, DeviceMemoryError: as for `encode`. OptionError: as there, or a loss
        without a gradient in the prompts.
    """
    check_prompts(backbone, prompts)
    num_images = _check_images(backbone, images, len(prompts))
    ops = operations.select(backbone, impl)
    limit = MicroBatch.of(micro_batch)
    size = limit.resolve(backbone, prompts, backward=True)
    precise = torch.promote_types(backbone.dtype, torch.float32)
    # inference_mode(False): a caller inside inference mode would otherwise get tensors without a graph.
    with torch.inference_mode(False), _no_autocast(backbone):
        gradients = torch.zeros(prompts.shape, device=backbone.device, dtype=precise)
        losses = torch.zeros(len(prompts), device=backbone.device, dtype=precise)
        features = torch.empty(len(prompts), num_images, backbone.width, device=backbone.device, dtype=backbone.dtype)
        prompts = prompts.detach().clone().to(device=backbone.device, dtype=backbone.dtype)

        def row(image_slice: slice, prompt_slices: list[slice], _: bool) -> tuple[slice, list[_Pulled]]:
            done = []
            for s, tokens in _embedded(backbone, images, image_slice, prompt_slices, ops):
                with torch.enable_grad():
                    leaf = prompts[s].clone().requires_grad_()
                    out = network.features(backbone, tokens, leaf, ops)
                    value = loss(out, s, image_slice)
                    gradient = None
                    if value.requires_grad:
                        (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
                    if gradient is None:
                        raise OptionError(
                            "the loss has no gradient in the prompts: compute it, and the logits of a head of your "
                            "own, from the features, and not under torch.no_grad()"
                        )
                done.append((s, out.detach(), value.detach(), gradient))
            return image_slice, done

        for image_slice, done in _rows(row, len(prompts), num_images, size, limit, backbone.device):
            for s, out, value, gradient in done:
                features[s, image_slice] = out
                losses[s] += value
                gradients[s] += gradient
    return features, losses, gradients


class MultiPromptEncoder(nn.Module):
    """`encode` as a module, for training stacks.

    Args:
        backbone: held as buffers outside the state dict: `.to()` moves it, optimisers do not see it.
        prompts: optional [M, p, d] or [M, L, p, d]; a trainable parameter `prompts` is made of a copy.
        micro_batch, impl: as for `encode`; what suits the device is found with the first batch.

    Raises:
        BackboneError, PromptError, OptionError: as for `encode`; of prompts and micro_batch, when it is made.
    """

    prompts: nn.Parameter | None

    def __init__(
        self,
        backbone: FrozenViT,
        prompts: Tensor | None = None,
        *,
        micro_batch: int | MicroBatch | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.micro_batch = MicroBatch.of(micro_batch)
        self.impl: Impl = impl
        if prompts is None:
            self.register_parameter("prompts", None)
        else:
            check_prompts(backbone, prompts)
            self.prompts = nn.Parameter(prompts.detach().clone())

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W] or [M, B, 3, H, W] → features [M, B, h], under `prompts` or, without them, under the
        module's own."""
        chosen = self.prompts if prompts is None else prompts
        if chosen is None:
            raise PromptError("MultiPromptEncoder was made without prompts: pass them to forward(images, prompts)")
        return encode(self.backbone, chosen, images, micro_batch=self.micro_batch, impl=self.impl)


def check_prompts(backbone: FrozenViT, prompts: Tensor) -> None:
    """Raise BackboneError unless the backbone is a packed one, PromptError unless prompts are floating [M, p, d] or
    [M, L, p, d] for it, M ≥ 1."""
    if not isinstance(backbone, FrozenViT):
        raise BackboneError(
            f"backbone must be a FrozenViT, got {type(backbone).__name__}: "
            "pack a timm model once, with FrozenViT.from_timm"
        )
    if not isinstance(prompts, Tensor):
        raise PromptError(f"prompts must be a torch.Tensor, got {type(prompts).__name__}")
    shape = list(prompts.shape)
    if prompts.ndim not in (3, 4) or not prompts.is_floating_point():
        raise PromptError(
            f"prompts must be floating point [M, p, d] (shallow) or [M, L, p, d] (deep), got {shape} {prompts.dtype}"
        )
    if shape[0] == 0:
        raise PromptError("there are no prompts: M = 0")
    if shape[-1] != backbone.width:
        raise PromptError(
            f"prompts are {shape[-1]} wide, {backbone.name} is {backbone.width} wide: another backbone's?"
        )
    if prompts.ndim == 4 and shape[1] != backbone.depth:
        raise PromptError(f"deep prompts have {shape[1]} layers, {backbone.name} has {backbone.depth} blocks")


def bytes_per_token(backbone: FrozenViT, tokens: int, *, backward: bool) -> int:
    """Memory that one token of a sequence of `tokens` takes in the network, about: what is alive at once in a block; in
    the backward pass also what every block keeps (normalised rows, queries, keys and values, attention's output, the
    MLP's inner layer, and in float32 attention's weights with copies of what they are made of)."""
    block = backbone.blocks[0]
    width, inner, size = backbone.width, block.fc1_weight.shape[0], backbone.dtype.itemsize
    scores = block.num_heads * tokens + 3 * width if backbone.dtype.itemsize > 2 else 0
    alive = 2 * 4 * width + size * (6 * width + 2 * inner + 2 * scores)
    return alive + (backbone.depth * size * (6 * width + inner + scores) if backward else 0)


def _rows(
    compute: Callable[[slice, list[slice], bool], _Row],
    num_prompts: int,
    num_images: int,
    size: int,
    limit: MicroBatch,
    device: torch.device,
) -> Iterator[_Row]:
    """compute(images, prompts, whether there are other micro-batches) for all images in order, each under all prompts.

    As many images as fit into `size` pairs, then as many prompts: a prompt's own work in the first block (and in every
    block if it is deep) is shared by the images beside it, and the images' by all prompts. Where memory runs out, what
    was computed for these images is lost, and they are done again with micro-batches of half the size.
    """
    start = 0
    while start < num_images:
        images_at_once = max(1, min(size, num_images))
        prompts_at_once = min(max(1, size // images_at_once), num_prompts)
        images = slice(start, min(start + images_at_once, num_images))
        prompts = [slice(i, min(i + prompts_at_once, num_prompts)) for i in range(0, num_prompts, prompts_at_once)]
        reason = None
        try:
            row = compute(images, prompts, num_prompts * num_images > size)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            pairs = prompts_at_once * (images.stop - images.start)
            reason = str(error)
            if pairs == 1:
                raise DeviceMemoryError(
                    f"{device} has no memory for one image under one prompt ({reason.splitlines()[0]}): give a dtype "
                    "of fewer bytes, a smaller backbone or image size, or end what else is on the device"
                ) from error
        if reason is not None:  # only here, behind the error, are the tensors of the attempt free
            size = limit.halve(pairs, device, reason)
            continue
        yield row
        start = images.stop


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of PyTorch's allocator, or of the driver, when Triton first loads a kernel onto a full device."""
    return isinstance(error, torch.OutOfMemoryError) or str(error) == "Triton Error [CUDA]: out of memory"


def _embedded(
    backbone: FrozenViT, images: Tensor, image_slice: slice, prompt_slices: list[slice], ops: Operations
) -> Iterator[tuple[slice, network.ImageTokens]]:
    """The prompts' slices, each with the tokens of its images: the same for all, or embedded when their turn comes."""

    def embed(chosen: Tensor) -> network.ImageTokens:
        with torch.no_grad():
            # A copy: images made inside inference mode take no part in a graph.
            if not torch.compiler.is_compiling() and chosen.is_inference():
                chosen = chosen.clone()
            return network.embed(backbone, backbone.prepare(chosen), ops)

    if images.ndim == 4:
        tokens = embed(images[image_slice])
        for s in prompt_slices:
            yield s, tokens
    else:
        for s in prompt_slices:
            yield s, embed(images[s, image_slice])


def _check_images(backbone: FrozenViT, images: Tensor, num_prompts: int) -> int:
    """B of images [B, 3, H, W] or [M, B, 3, H, W]; DataError where they are neither."""
    if isinstance(images, Tensor) and images.ndim == 5:
        if len(images) != num_prompts:
            raise DataError(f"images {list(images.shape)} are of {len(images)} prompts, there are {num_prompts}")
        backbone.check_images(images[0])
        return images.shape[1]
    backbone.check_images(images)
    return len(images)


def _no_autocast(backbone: FrozenViT) -> contextlib.AbstractContextManager[None]:
    """The compute dtype is the backbone's, not that of a surrounding autocast region."""
    return torch.autocast(backbone.device.type, enabled=False)
