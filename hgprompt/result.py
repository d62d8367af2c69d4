"""EnsembleResult: how much of each prompt to take, the mixed prompt, and why."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgprompt.errors import FileFormatError
from hgprompt.pool import BackboneInfo, check_name
from hgprompt.strict_json import is_number, jsonable

if TYPE_CHECKING:
    from hgprompt.optimize import WeightProblem

_VERSION = 2
_BY_PROMPT = ("weights", "weight_std", "source_h_scores", "source_h_score_std", "source_rank_std")
_TENSORS = (*_BY_PROMPT, "prompt", "gradient_cosines")
_NOT_IN_THE_RECORD = (*_TENSORS, "problem")
_DATA_FILE, _REPORT_FILE = "ensemble.safetensors", "report.json"


@dataclass(frozen=True, eq=False)
class EnsembleResult:
    """What `fast_ensemble` returns.

    Attributes:
        weights: α [M], float64, on the simplex. names: of the prompts, in the same order.
        prompt: Σ α_i P_i [p, d] (deep: [L, p, d]), float32 or the prompts' float64: the start for tuning.
        h_score: H(Σ α_i f_i), raw (at most C-1), shrunk with `shrinkage_intensity`.
        alignment_loss: L_align(α); NaN without gradients. objective: what was minimised.
        gap: Frank–Wolfe gap of the objective at α; converged: it reached the tolerance.
        h_score_std: standard error of H at these weights.
        source_h_scores: H of each prompt alone [M], with the same intensity. source_h_score_std: their standard errors.
        source_rank_std: standard error of each prompt's rank among them [M] (0 where it is certain).
        uniform_h_score: H at uniform weights: how much there was to gain.
        gradient_cosines: ⟨ĝ_i, ĝ_j⟩ [M, M]; NaN without gradients.
        weight_std: jackknife standard error of α [M]; NaN with fewer than two folds.
        weight_error: bound on ‖α - α_∞‖₁, α_∞ being that of endlessly many such images: the jackknife's 90 % quantile,
            which does not see a minimum that would take over with more images; NaN with fewer than two folds. Where a
            tolerance stopped the pass, the bound of `hgprompt.stopping`, which is wider.
        stop_reason: "end of data", or "tolerance reached": weight_error fell to the tolerance that was asked for.
        n_images, n_classes: what the pass saw. n_gradient_images: of these, how many the gradients come from.
        sample_h_score, sample_h_score_mixed_prompt: on the gradient images alone, H of the mixed features and of the
            features under the mixed prompt: mixing features (Eq. 4) is not mixing prompts (Eq. 2), and their
            difference says how far apart the two are here. NaN without a sample: with lam=0, or a head of your own.
        kept_bytes: statistics, gradient images and gradients that the pass kept (over a process group: on its first
            rank, where statistics are those of all).
        classes: observed labels. lam, settings: how it was asked for. backbone: which backbone.
        problem: with `keep_problem`, what else the pass can answer: other λ, paths, ablations, pools without a prompt;
            None where it was not asked for, on other ranks than the first, and in what was loaded.
    """

    weights: Tensor
    names: tuple[str, ...]
    prompt: Tensor
    h_score: float
    h_score_std: float
    alignment_loss: float
    objective: float
    gap: float
    converged: bool
    source_h_scores: Tensor
    source_h_score_std: Tensor
    source_rank_std: Tensor
    uniform_h_score: float
    gradient_cosines: Tensor
    weight_std: Tensor
    weight_error: float
    stop_reason: str
    n_images: int
    n_classes: int
    n_gradient_images: int
    sample_h_score: float
    sample_h_score_mixed_prompt: float
    shrinkage_intensity: float
    kept_bytes: int
    classes: tuple[int, ...]
    lam: float
    settings: dict[str, Any]
    backbone: BackboneInfo
    problem: WeightProblem | None = field(default=None, repr=False)

    def save(self, directory: str | Path) -> None:
        """Write `ensemble.safetensors` (all of it) and `report.json` (the numbers, to read) into a directory.

        Each file is replaced as a whole or not at all; the directory is made if it is missing.

        Raises:
            OutputError: the directory cannot be written.
        """
        from hgprompt.files import make_directory, write_safetensors, write_text

        directory = make_directory(directory)
        tensors, record = self.to_parts()
        write_safetensors(directory / _DATA_FILE, tensors, record)
        report = {
            **self.by_prompt(),
            **{k: v for k, v in record.items() if k not in ("format", "version", "names")},
        }
        write_text(directory / _REPORT_FILE, json.dumps(jsonable(report), indent=2, allow_nan=False) + "\n")

    def by_prompt(self) -> dict[str, dict[str, float]]:
        """What there is a number of for each prompt: {"weights": {name: α_i}, …}."""
        return {key: dict(zip(self.names, getattr(self, key).tolist(), strict=True)) for key in _BY_PROMPT}

    @property
    def best_single(self) -> str:
        """The prompt with the highest H alone; of equal ones the first.

        Where images or epochs are few, the better start on a real ViT-B/16 (docs/results.md).
        """
        return self.names[int(self.source_h_scores.argmax())]

    @classmethod
    def load(cls, directory: str | Path) -> EnsembleResult:
        """Read what `save` wrote into a directory; its file's own path will do.

        Raises:
            FileFormatError: a file that is missing, damaged, or something else.
        """
        from hgprompt.files import read_safetensors

        path = Path(directory)
        path = path if path.is_file() or path.name == _DATA_FILE else path / _DATA_FILE
        tensors, record = read_safetensors(path)
        if record.get("format") != "hgprompt-ensemble" or record.get("version") != _VERSION:
            raise FileFormatError(
                f"{path} is no hgprompt ensemble of version {_VERSION} "
                f"(it says {record.get('format')!r:.50}, version {record.get('version')!r:.50})"
            )
        try:
            if tensors.keys() != set(_TENSORS):
                raise ValueError(f"its tensors are {sorted(tensors)[:20]!r:.300}")
            result = cls.from_parts(tensors, record)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is incomplete or not understood: {error!s:.400}") from error
        m = len(result.names)
        for name, shape in {**dict.fromkeys(_BY_PROMPT, (m,)), "gradient_cosines": (m, m)}.items():
            if tuple(tensors[name].shape) != shape:
                raise FileFormatError(f"{path}: {name} is {list(tensors[name].shape)}, expected {list(shape)}")
        weights, prompt = result.weights, result.prompt
        if not all(tensor.is_floating_point() and tensor.itemsize >= 4 for tensor in tensors.values()):
            raise FileFormatError(f"{path}: a tensor is not float32 or float64")
        # Saved weights are on the simplex to float64's rounding; NaN compares as false.
        if not (bool((weights >= -1e-6).all()) and abs(float(weights.sum()) - 1) < 1e-3):
            raise FileFormatError(f"{path}: its weights are not on the simplex")
        if prompt.ndim not in (2, 3) or prompt.numel() == 0 or not bool(prompt.isfinite().all()):
            raise FileFormatError(f"{path}: its prompt is {list(prompt.shape)}, or holds NaN or infinity")
        if prompt.shape[-1] != result.backbone.width or (prompt.ndim == 3 and len(prompt) != result.backbone.depth):
            raise FileFormatError(f"{path}: its prompt {list(prompt.shape)} does not fit its backbone")
        return result

    def to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON-able record: all there is, for `from_parts`."""
        return {k: getattr(self, k) for k in _TENSORS}, self._record()

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> EnsembleResult:
        """The inverse of `to_parts`; KeyError, TypeError or ValueError where something is missing or another type."""
        fields = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name not in _NOT_IN_THE_RECORD}
        fields |= {name: tensors[name] for name in _TENSORS}
        fields["names"], fields["classes"] = tuple(fields["names"]), tuple(fields["classes"])
        fields["backbone"] = BackboneInfo.from_dict(fields["backbone"])
        for name, value in fields.items():
            if value is None:
                fields[name] = float("nan")
        _check_types(fields)
        return cls(**fields)

    def plot(self, path: str | Path) -> None:
        """Draw weights, source H-scores and gradient cosines into an image file."""
        from hgprompt.plots import plot_ensemble

        plot_ensemble(self, path)

    def __str__(self) -> str:
        order = torch.argsort(self.weights, descending=True).tolist()
        width = max(len(name) for name in self.names)
        lines = [f"{'prompt':{width}}   weight     std  H alone     std"]
        lines += [
            f"{self.names[i]:{width}}   {self.weights[i]:6.3f}  {self.weight_std[i]:6.3f}  "
            f"{self.source_h_scores[i]:7.3f} {self.source_h_score_std[i]:7.3f}"
            for i in order
        ]
        lines.append(
            f"H {self.h_score:.3f} of at most {self.n_classes - 1} (uniform {self.uniform_h_score:.3f}), "
            f"alignment loss {self.alignment_loss:.3f}, gap {self.gap:.1e}, "
            f"{self.n_images} images, {self.n_classes} classes"
        )
        if self.stop_reason != "end of data":
            lines.append(f"stopped early: α is known to {self.weight_error:.3f} (L1)")
        return "\n".join(lines)

    def _record(self) -> dict[str, Any]:
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_IN_THE_RECORD}
        record["backbone"] = self.backbone.to_dict()
        plain: dict[str, Any] = jsonable({"format": "hgprompt-ensemble", "version": _VERSION, **record})
        return plain


def _check_types(fields: dict[str, Any]) -> None:
    """Raise TypeError for a field of another type than a result has."""
    for name in ("h_score", "h_score_std", "weight_error", "alignment_loss", "objective", "gap", "uniform_h_score",
                 "sample_h_score",
                 "sample_h_score_mixed_prompt", "shrinkage_intensity", "lam", "n_images", "n_classes",
                 "n_gradient_images", "kept_bytes"):  # fmt: skip
        if not is_number(fields[name]):
            raise TypeError(f"{name} is no number")
    for name in ("n_images", "n_classes", "n_gradient_images", "kept_bytes"):
        if type(fields[name]) is not int or fields[name] < 0:
            raise TypeError(f"{name} is no count")
    for name in ("h_score", "alignment_loss", "gap", "lam", "shrinkage_intensity"):
        if fields[name] < -1e-6:  # but for rounding; NaN where there is none
            raise TypeError(f"{name} is negative")
    for name in fields["names"]:
        check_name(name)
    if not fields["names"] or len(set(fields["names"])) != len(fields["names"]):
        raise TypeError("there are no names, or one stands twice")
    if not all(type(c) is int and 0 <= c < 2**63 for c in fields["classes"]):
        raise TypeError("classes are integers")
    if len(fields["classes"]) != fields["n_classes"]:
        raise TypeError(f"{len(fields['classes'])} classes, where n_classes is {fields['n_classes']}")
    reason = fields["stop_reason"]
    if not isinstance(reason, str) or len(reason) > 200 or not reason.isprintable():
        raise TypeError("stop_reason is no text")
    if not isinstance(fields["converged"], bool) or not isinstance(fields["settings"], dict):
        raise TypeError("converged or settings are of another type")
