"""HGPrompt: start from Σ α_i P_i, with α of Eq. 12 by `fast_ensemble`."""

from __future__ import annotations

from typing import Any, ClassVar

from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import OptionError
from hgprompt.tuning.method import Cost, Setting
from hgprompt.tuning.methods.start import Start, StartMethod, named, sources

_GRADIENT_IMAGES = 256
_BATCH = 64


class HGPrompt(StartMethod):
    """Start from HGPrompt's mixture of the sources.

    Args:
        lam: λ of Eq. 12; 0: the H-score alone.
        gradient_images: as for `fast_ensemble`.
    """

    name = "HGPrompt"
    uses_pool = True
    revision = 2  # of the folds that heads are cross-fitted on, and their temperatures
    options: ClassVar[dict[str, Any]] = {}  # of fast_ensemble, beside those below

    def __init__(self, lam: float = 1.0, gradient_images: int | None = _GRADIENT_IMAGES) -> None:
        if not lam >= 0:
            raise OptionError(f"lam must be at least 0, got {lam}")
        self.lam, self.gradient_images = lam, 0 if lam == 0 else gradient_images
        if lam != 1.0:
            self.name = f"{type(self).name} λ={lam:g}"

    def start(self, setting: Setting, seed: int) -> Start:
        pool = sources(setting)
        result = fast_ensemble(
            pool, setting.train.batches(_BATCH), backbone=setting.backbone, lam=self.lam, seed=seed,
            gradient_images=self.gradient_images, **self.options,
        )  # fmt: skip
        report = {
            "weights": dict(zip(result.names, result.weights.tolist(), strict=True)),
            "h_score": result.h_score,
            "source_h_scores": named(pool, result.source_h_scores),
        }
        return Start(result.prompt, self.cost(setting), report)

    def cost(self, setting: Setting) -> Cost:
        """Every image under every source, and the sample of the gradients once more, there and back."""
        images, m = len(setting.train), len(sources(setting))
        sample = images if self.gradient_images is None else min(images, self.gradient_images)
        return Cost(forward=images * m, backward=sample * m)


class RawHGPrompt(HGPrompt):
    """With H as it stands in Eq. 12, and not divided by C - 1: λ is the paper's."""

    name = "HGPrompt, raw H"
    options: ClassVar[dict[str, Any]] = {"normalize": False}


class PaperHGPrompt(HGPrompt):
    """Algorithm 1 to the letter (`preset="paper"`): H not shrunk either, every image's gradient, projected gradient."""

    name = "HGPrompt, paper"
    options: ClassVar[dict[str, Any]] = {"preset": "paper"}

    def __init__(self, lam: float = 1.0) -> None:
        super().__init__(lam)
        self.gradient_images = None  # also at λ = 0: the preset takes them whatever λ is


class FittedHGPrompt(HGPrompt):
    """Under a head in closed form, fitted to the training images under Σ α_i P_i: not in the paper."""

    name = "HGPrompt, fitted head"
    head = "fitted"


class BestSingleByH(StartMethod):
    """The source with the highest H-score on the training images, alone: `EnsembleResult.best_single`."""

    name = "best single by H"
    uses_pool = True

    def start(self, setting: Setting, seed: int) -> Start:
        pool = sources(setting)
        result = fast_ensemble(
            pool, setting.train.batches(_BATCH), backbone=setting.backbone, lam=0, gradient_images=0, seed=seed
        )
        report = {
            "source": result.best_single,
            "source_h_scores": named(pool, result.source_h_scores),
        }
        return Start(pool[result.best_single], Cost(forward=len(setting.train) * len(pool)), report)


class FittedBestSingleByH(BestSingleByH):
    """The same under a head in closed form."""

    name = "best single by H, fitted head"
    head = "fitted"
