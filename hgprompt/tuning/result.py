"""TuneResult: tuned prompts and heads, how they got there, in memory and on disk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hgprompt.errors import FileFormatError, HGPromptError, OptionError
from hgprompt.pool import BackboneInfo
from hgprompt.strict_json import is_number
from hgprompt.tuning.config import TuneConfig

_FORMAT, _VERSION = "hgprompt-tuned", 1
_FILE, _HISTORY = "tuned.safetensors", "history.json"
MAX_NAME = 1_000
_TENSORS = ("prompts", "head_weight", "head_bias")


@dataclass(frozen=True, eq=False)
class TuneResult:
    """What `tune` returns, for K runs.

    Attributes:
        names: of the runs. prompts: [K, p, d] (deep: [K, L, p, d]), float32, on the CPU.
        head_weight [K, C, h], head_bias [K, C]: of the linear heads on the features.
        history: one record per epoch: epoch (from 1), lr (at its end), and lists over the K runs of loss and
            train_accuracy (means over the epoch's steps, before each step) and, where it was measured, test_accuracy.
        config: how they were tuned. task, class_names: on what. backbone: with what.
        seconds: of training, without evaluation (this call's alone after a resume; NaN for a result from a file, which
            is the same however long it took).
    """

    names: tuple[str, ...]
    prompts: Tensor
    head_weight: Tensor
    head_bias: Tensor
    history: tuple[dict[str, Any], ...]
    config: TuneConfig
    task: str
    class_names: tuple[str, ...] | None
    backbone: BackboneInfo
    seconds: float

    def prompt(self, name: str) -> Tensor:
        """[p, d] (deep: [L, p, d]) of one run; OptionError for a name that none has."""
        return self.prompts[self._index(name)]

    def accuracy(self, name: str) -> float:
        """On the test images after the last epoch; NaN where there were none."""
        last: list[float] = self.history[-1].get("test_accuracy", [float("nan")] * len(self.names))
        return last[self._index(name)]

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise OptionError(f"no run is called {name!r}; there are {list(self.names)}")
        return self.names.index(name)

    def save(self, directory: str | Path) -> tuple[Path, Path]:
        """Write `tuned.safetensors` (all of it) and `history.json` (the record, to read); the files' paths.

        Raises:
            OutputError: the directory cannot be written.
        """
        import json

        from hgprompt.files import make_directory, write_safetensors, write_text

        directory = make_directory(directory)
        record = {
            "format": _FORMAT,
            "version": _VERSION,
            "names": list(self.names),
            "history": list(self.history),
            "config": dataclasses.asdict(self.config),
            "task": self.task,
            "class_names": None if self.class_names is None else list(self.class_names),
            "backbone": self.backbone.to_dict(),
        }
        write_safetensors(directory / _FILE, {name: getattr(self, name) for name in _TENSORS}, record)
        write_text(directory / _HISTORY, json.dumps(record, indent=2, allow_nan=False, sort_keys=True) + "\n")
        return directory / _FILE, directory / _HISTORY

    @classmethod
    def load(cls, directory: str | Path) -> TuneResult:
        """Read what `save` wrote into a directory (its file's own path will do); it may come from anybody.

        Raises:
            FileFormatError: anything but a whole, consistent result.
        """
        from hgprompt.files import read_safetensors

        path = Path(directory)
        path = path if path.name == _FILE else path / _FILE
        tensors, record = read_safetensors(path)
        if record.get("format") != _FORMAT or record.get("version") != _VERSION:
            raise FileFormatError(f"{path} is no tuned prompt of this version (hgprompt tune makes one)")
        try:
            names, classes = record["names"], record["class_names"]
            result = cls(
                names=_names(names),
                **{name: tensors[name] for name in _TENSORS},
                history=tuple(dict(entry) for entry in record["history"]),
                config=TuneConfig(**record["config"]),
                task=_texts([record["task"]])[0],
                class_names=None if classes is None else _texts(classes),
                backbone=BackboneInfo.from_dict(record["backbone"]),
                seconds=float("nan"),
            )
        except (KeyError, TypeError, ValueError, HGPromptError) as error:
            raise FileFormatError(f"{path} is incomplete or not understood: {error!r:.200}") from error
        runs = len(result.names)
        head, bias = result.head_weight, result.head_bias
        good = result.prompts.ndim in (3, 4) and len(result.prompts) == runs and len(result.history) > 0
        good = good and all(_is_record(entry, runs) for entry in result.history)
        if not good or head.ndim != 3 or len(head) != runs or tuple(bias.shape) != tuple(head.shape[:2]):
            raise FileFormatError(f"{path}: its tensors or its history do not fit together")
        if classes is not None and len(classes) != head.shape[1]:
            raise FileFormatError(f"{path}: {len(classes)} classes have names, its heads have {head.shape[1]}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.itemsize < 4 or not bool(tensor.isfinite().all()):
                raise FileFormatError(f"{path}: {name[:80]!r} is not float32 or float64, or holds NaN or infinity")
        return result


def _is_record(entry: dict[str, Any], runs: int) -> bool:
    """Whether a record of an epoch holds numbers for every run, as `tune` writes them."""
    lists = [entry.get("loss"), entry.get("train_accuracy"), entry.get("test_accuracy", [0.0] * runs)]
    numbers = [entry.get("epoch"), entry.get("lr")]
    for values in lists:
        if not isinstance(values, list) or len(values) != runs:
            return False
        numbers += values
    return all(is_number(n) for n in numbers)


def _names(values: Any) -> tuple[str, ...]:
    names = _texts(values)
    if not names or len(set(names)) != len(names) or not all(name.isprintable() for name in names):
        raise ValueError("there are no names, or one stands twice or cannot be printed")
    return names


def _texts(values: Any) -> tuple[str, ...]:
    """Of tasks and classes, which are named by folders; ValueError for what is no list of such texts."""
    if not isinstance(values, list) or not all(isinstance(v, str) and len(v) <= MAX_NAME for v in values):
        raise ValueError("names of the task and its classes are texts")
    return tuple(values)
