"""Checkpoints of a training: one safetensors file, replaced as a whole after every epoch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hgprompt.data.images import LabelledImages
from hgprompt.errors import FileFormatError, OptionError, OutputError, warn
from hgprompt.files import differences, digest_of_tensors, read_safetensors, write_safetensors
from hgprompt.strict_json import is_number

_FORMAT, _VERSION = "hgprompt-tuning", 3


class Checkpoint:
    """The file of one training.

    Args:
        path: where. run: what makes two trainings one and the same, JSON-able: only then may one continue the other's.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.run = json.loads(json.dumps(run))
        self._warned = False

    def write(self, tensors: Mapping[str, Tensor], history: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file. Where it cannot be written, what was there before stays, and a warning is given once."""
        metadata = {"format": _FORMAT, "version": _VERSION, "run": self.run, "history": list(history)}
        try:
            write_safetensors(self.path, tensors, metadata)
        except OutputError as error:
            if not self._warned:
                warn(f"no checkpoint could be written, the training goes on: {error}")
            self._warned = True

    def read(self, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Tensors and history; none where there is no file yet.

        Args:
            like: tensors of the names, shapes and dtypes that the file must have.

        Raises:
            FileFormatError: a damaged file. OptionError: a checkpoint of another run.
        """
        if not self.path.exists():
            return {}, []
        stored, metadata = read_safetensors(self.path)
        if metadata.get("format") != _FORMAT or metadata.get("version") != _VERSION:
            raise FileFormatError(f"{self.path} is no checkpoint of this version's tuning; choose another file")
        run = metadata.get("run")
        if run != self.run:
            raise OptionError(
                f"{self.path} is the checkpoint of another run (it differs in {differences(run, self.run)}): choose "
                "another place, or delete it to begin again"
            )
        shapes = {name: (value.shape, value.dtype) for name, value in like.items()}
        if {name: (value.shape, value.dtype) for name, value in stored.items()} != shapes:
            raise FileFormatError(f"{self.path}: its tensors are not those of this run; delete it to begin again")
        history = metadata.get("history")
        runs = {len(value) for value in like.values()}
        if not isinstance(history, list) or not all(_is_record(r, i, runs) for i, r in enumerate(history, start=1)):
            raise FileFormatError(f"{self.path}: its history is not understood; delete it to begin again")
        if not all(bool(value.isfinite().all()) for value in stored.values()):
            raise FileFormatError(f"{self.path} holds NaN or infinity; delete it to begin again")
        return stored, history


def _is_record(record: Any, epoch: int, runs: set[int]) -> bool:
    """Whether this is an epoch's record as `tune` writes them: numbers for each run, null where a loss is none."""
    if not isinstance(record, dict) or type(record.get("epoch")) is not int or record["epoch"] != epoch:
        return False
    for key in {"loss", "lr", "train_accuracy"} | (record.keys() & {"test_accuracy"}):
        values = record.get(key)
        if not isinstance(values, list) or {len(values)} != runs:
            return False
        if not all(is_number(value) or (key == "loss" and value is None) for value in values):
            return False
    return True


def digest_of_images(images: Any) -> str:
    """Of the images themselves where they are in memory; of their files' names and sizes where they are not."""
    if isinstance(images, LabelledImages):
        return digest_of_tensors([images.images, images.labels])
    listing: list[Any] = [[str(path), path.stat().st_size, label] for path, label in images.samples]
    listing += [list(images.image_size), images.interpolation]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
