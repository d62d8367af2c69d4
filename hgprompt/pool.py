"""PromptPool: named prompts with their provenance, in memory and as one safetensors file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgprompt import strict_json
from hgprompt.arguments import kind_of
from hgprompt.errors import FileFormatError, PromptError, warn

if TYPE_CHECKING:
    from hgprompt.backbone import FrozenViT

_FORMAT, _VERSION = "hgprompt-pool", 1
_PREFIX = "prompts."
_MAX_NAME = 200
_MAX_METADATA_DEPTH = strict_json.MAX_DEPTH - 2  # in a file it lies two levels down
# What a stranger's file can make us allocate: its prompts in float32, and a backbone for images of this size.
_MAX_BYTES = 8 * 2**30
_MAX_EXTENT = 16_384  # width, depth
_MAX_PIXELS = 4096  # of a side
_NEAR = 10_000  # names that a mistyped one is compared with


@dataclass(frozen=True)
class BackboneInfo:
    """Which frozen network prompts were tuned for.

    Attributes:
        name: architecture, a timm name. fingerprint: SHA-256 of its weights (`hgprompt.backbone.fingerprint`), or ""
        where it is not known. width: d. depth: number of blocks. image_size: (height, width) in pixels.
        mean, std: normalisation of the images, one number per channel. interpolation: with which they were resized.
        None: not recorded.
    """

    name: str
    fingerprint: str
    width: int
    depth: int
    image_size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None

    def check(self, now: BackboneInfo) -> None:
        """Raise PromptError if prompts of this network are to be used with another; the image size may differ.

        Another normalisation or resize filter of the images is a warning: whoever feeds images that are ready knows.
        """
        same = (self.width, self.depth) == (now.width, now.depth)
        if not same or (self.fingerprint and now.fingerprint and self.fingerprint != now.fingerprint):
            raise PromptError(
                f"the prompts were tuned for backbone {self.name} ({_short(self)}), this is {now.name} "
                f"({_short(now)}): a prompt means nothing to other weights. Load the weights that they were tuned "
                "with, or tune new ones"
            )
        for key in ("mean", "std", "interpolation"):
            tuned, given = getattr(self, key), getattr(now, key)
            if None not in (tuned, given) and tuned != given:
                warn(f"the prompts were tuned on images of {key} {tuned}, this backbone's have {given}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        lists: dict[str, Any] = {"image_size": list(self.image_size)}
        lists |= {k: list(v) for k, v in (("mean", self.mean), ("std", self.std)) if v is not None}
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, record: Any) -> BackboneInfo:
        """The inverse of `to_dict`, or FileFormatError."""
        try:
            name, fingerprint = record["name"], record["fingerprint"]
            numbers = [record["width"], record["depth"], *record["image_size"]]
            good = len(numbers) == 4 and all(type(n) is int and 0 < n <= _MAX_EXTENT for n in numbers)
            good = good and max(numbers[2:]) <= _MAX_PIXELS
            mean, std = (_channels(record.get(key)) for key in ("mean", "std"))
            good = good and (std is None or min(std) > 0)
            interpolation = record.get("interpolation")
            texts = [name, fingerprint, "" if interpolation is None else interpolation]
            good = good and all(isinstance(t, str) and len(t) < 500 and t.isprintable() for t in texts)
        except (AttributeError, KeyError, TypeError) as error:
            raise FileFormatError(f"the backbone's record is incomplete: {error!r}") from error
        if not good:
            raise FileFormatError(f"the backbone's record is not understood: {record!r:.200}")
        return cls(name, fingerprint, numbers[0], numbers[1], (numbers[2], numbers[3]), mean, std, interpolation)


def _channels(values: Any) -> tuple[float, ...] | None:
    """One finite number per channel, or TypeError."""
    if values is None:
        return None
    if not isinstance(values, list) or not 1 <= len(values) <= 64:
        raise TypeError("mean and std are lists of a number per channel")
    if not all(isinstance(v, (int, float)) and abs(v) < 1e6 for v in values):
        raise TypeError("mean and std are lists of finite numbers")
    return tuple(float(v) for v in values)


class PromptPool(Mapping[str, Tensor]):
    """Named prompts of one shape, for one backbone.

    Args:
        prompts: {name: [p, d]}, a sequence of [p, d], or a tensor [M, p, d]; deep prompts are [L, p, d] each. Kept as
            copies on the CPU, in float32 (float64 stays).
        backbone: which network they were tuned for (`vit.info`, or the FrozenViT itself); None: that of a pool that is
            given, else not known.
        metadata: {name: record} of where each prompt comes from, JSON-able. Standard keys: task, init_seed,
            training (a dict), source.

    Raises:
        PromptError: no prompts, or prompts that are not finite tensors of one shape.
    """

    def __init__(
        self,
        prompts: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
        *,
        backbone: BackboneInfo | FrozenViT | None = None,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if isinstance(prompts, PromptPool):  # its provenance comes along
            backbone = prompts.backbone if backbone is None else backbone
            metadata = prompts.metadata if metadata is None else metadata
        info: Any = getattr(backbone, "info", backbone)  # a FrozenViT knows its own
        if not isinstance(info, BackboneInfo | None):
            raise PromptError(f"backbone must be a BackboneInfo (vit.info), got {type(backbone).__name__}")
        if not (metadata is None or isinstance(metadata, Mapping)) or not all(
            isinstance(record, Mapping) for record in (metadata or {}).values()
        ):
            raise PromptError("metadata must be {name: record}, each record a mapping")
        self._prompts = {name: _checked(name, prompt) for name, prompt in _named(prompts).items()}
        if not self._prompts:
            raise PromptError("there are no prompts: M = 0")
        names = list(self._prompts)
        first = self._prompts[names[0]]
        for name, prompt in self._prompts.items():
            if prompt.shape != first.shape:
                raise PromptError(
                    f"prompts must have one shape: {names[0]!r} is {list(first.shape)}, "
                    f"{name!r} is {list(prompt.shape)}"
                )
        if info is not None and (first.shape[-1] != info.width or (first.ndim == 3 and len(first) != info.depth)):
            raise PromptError(f"prompts of shape {list(first.shape)} do not fit {info.name}: {info!r:.600}")
        self.backbone: BackboneInfo | None = info
        unknown = set(metadata or {}) - set(names)
        if unknown:
            raise PromptError(f"metadata of prompts that are not here: {sorted(unknown)[:5]!r:.400}")
        records = {name: dict((metadata or {}).get(name, {})) for name in names}
        try:  # what a file would give back, and a copy
            text = json.dumps(records, allow_nan=False, sort_keys=True).encode()
            self.metadata: dict[str, dict[str, Any]] = strict_json.parse(text, max_depth=_MAX_METADATA_DEPTH)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(f"metadata must be JSON-able: {error}") from error

    @property
    def names(self) -> tuple[str, ...]:
        """In order."""
        return tuple(self._prompts)

    @property
    def num_tokens(self) -> int:
        """p."""
        return self._first.shape[-2]

    @property
    def width(self) -> int:
        """d."""
        return self._first.shape[-1]

    @property
    def is_deep(self) -> bool:
        """Whether each prompt has its own tokens for every block."""
        return self._first.ndim == 3

    def stack(self) -> Tensor:
        """[M, p, d], or [M, L, p, d] of deep prompts; a copy."""
        return torch.stack(list(self._prompts.values()))

    def subset(self, names: Sequence[str]) -> PromptPool:
        """A pool of these prompts alone, in this order."""
        return PromptPool(
            {name: self[name] for name in names},
            backbone=self.backbone,
            metadata={n: self.metadata[n] for n in names},
        )

    def without(self, *names: str) -> PromptPool:
        """A pool of all prompts but these."""
        for name in names:
            self[name]  # an error for a mistyped name, not silence
        return self.subset([name for name in self if name not in names])

    def merge(self, other: PromptPool) -> PromptPool:
        """A pool of both pools' prompts; they must be of one shape and backbone, and share no name."""
        both = set(self) & set(other)
        if both:
            raise PromptError(f"both pools have prompts named {sorted(both)[:5]}: rename them in one")
        if self.backbone is not None and other.backbone is not None:
            self.check_backbone(other.backbone)
        return PromptPool(
            {**self, **other},
            backbone=self.backbone or other.backbone,
            metadata={**self.metadata, **other.metadata},
        )

    def check_backbone(self, info: BackboneInfo) -> None:
        """`BackboneInfo.check`, where the pool knows its backbone."""
        if self.backbone is not None:
            self.backbone.check(info)

    def save(self, path: str | Path) -> None:
        """Write the pool as one safetensors file, whole or not at all.

        Raises:
            OutputError: the place cannot be written to.
        """
        from hgprompt.files import write_safetensors

        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "names": list(self.names),
            "backbone": None if self.backbone is None else self.backbone.to_dict(),
            "prompts": self.metadata,
        }
        write_safetensors(path, {_PREFIX + name: prompt for name, prompt in self.items()}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> PromptPool:
        """Read a pool that `save` wrote; the file may come from anybody.

        Raises:
            FileFormatError: anything but a whole, consistent pool. PromptError: prompts that cannot be used.
        """
        from hgprompt.files import read_safetensors

        tensors, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            other = {"hgprompt-ensemble": "an ensemble", "hgprompt-tuned": "a tuned prompt"}.get(
                str(metadata.get("format")), "a safetensors file"
            )
            raise FileFormatError(f"{path} is {other}, but no prompt pool (PromptPool.save makes one)")
        if metadata.get("version") != _VERSION:
            raise FileFormatError(
                f"{path} is a pool of version {metadata.get('version')!r:.50}, this hgprompt reads {_VERSION}: "
                "update it"
            )
        names, records = metadata.get("names"), metadata.get("prompts")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
            raise FileFormatError(f"{path}: its list of names is not understood")
        if {_PREFIX + n for n in names} != set(tensors):
            raise FileFormatError(f"{path}: its names and its tensors do not match")
        if not isinstance(records, dict) or not all(isinstance(r, dict) for r in records.values()):
            raise FileFormatError(f"{path}: its records of the prompts are not understood")
        backbone = metadata.get("backbone")
        info = None if backbone is None else BackboneInfo.from_dict(backbone)
        try:
            size = sum(t.numel() * max(4, t.itemsize) for t in tensors.values())
            if size > _MAX_BYTES:
                raise PromptError(f"its prompts take {size} bytes in float32, over the limit of {_MAX_BYTES}")
            return cls({n: tensors[_PREFIX + n] for n in names}, backbone=info, metadata=records)
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._prompts[name]
        except KeyError:
            raise UnknownPromptError(name, self.names) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __eq__(self, other: object) -> bool:
        """Same names in the same order, prompts to the last bit, backbone and records."""
        if not isinstance(other, PromptPool):
            return NotImplemented
        if (self.names, self.backbone, self.metadata) != (other.names, other.backbone, other.metadata):
            return False
        return all(mine.dtype == other[name].dtype and torch.equal(mine, other[name]) for name, mine in self.items())

    def __repr__(self) -> str:
        shape = "×".join(map(str, self._first.shape))
        return f"PromptPool({len(self)} prompts of {shape}, backbone={self.backbone.name if self.backbone else None})"

    @property
    def _first(self) -> Tensor:
        return next(iter(self._prompts.values()))


class UnknownPromptError(PromptError, KeyError):
    """A name that the pool does not have."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        near = difflib.get_close_matches(str(name)[:_MAX_NAME], known[:_NEAR], n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {', '.join(known[:10])}"
        self._message = f"no prompt is named {name!r}; {hint}"
        super().__init__(self._message)

    def __str__(self) -> str:  # KeyError would show the quoted repr
        return self._message


def _named(prompts: Any) -> dict[str, Any]:
    if isinstance(prompts, Mapping):
        return dict(prompts)
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (3, 4):
            raise PromptError(f"a tensor of prompts must be [M, p, d] or [M, L, p, d], got {list(prompts.shape)}")
    elif not isinstance(prompts, Sequence) or isinstance(prompts, (str, bytes)):
        raise PromptError(
            f"prompts must be a PromptPool, a mapping, a sequence or a tensor, got {type(prompts).__name__}"
            + ("; PromptPool.load reads a file" if isinstance(prompts, str) else "")
        )
    return {f"prompt_{i}": prompt for i, prompt in enumerate(prompts)}


def check_name(name: Any) -> None:
    """Raise PromptError unless this can be a prompt's name."""
    if not isinstance(name, str) or not name or len(name) > _MAX_NAME or not name.isprintable():
        raise PromptError(f"a prompt's name must be 1 to {_MAX_NAME} printable characters, got {name!r:.80}")


def _checked(name: Any, prompt: Any) -> Tensor:
    check_name(name)
    if not isinstance(prompt, Tensor) or not prompt.is_floating_point() or prompt.ndim not in (2, 3):
        found = kind_of(prompt)
        raise PromptError(f"prompt {name!r} must be a floating tensor [p, d] or, if deep, [L, p, d]; got {found}")
    if prompt.numel() == 0:
        raise PromptError(f"prompt {name!r} is empty: {list(prompt.shape)}")
    dtype = torch.float64 if prompt.dtype == torch.float64 else torch.float32
    prompt = prompt.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(prompt.isfinite().all()):
        raise PromptError(f"prompt {name!r} holds NaN or infinity")
    return prompt


def _short(info: BackboneInfo) -> str:
    return f"width {info.width}, depth {info.depth}, weights {info.fingerprint[:12] or 'unknown'}"
