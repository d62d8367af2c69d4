"""Which M prompts of a large pool are worth mixing.

Three ways, from cheap to thorough: by the H-score of each prompt alone, which takes twins of the best; greedily, each
prompt for what it adds to those already there; and successive halving, greedy selection that shows most prompts only a
few of the images (Karnin, Koren & Somekh 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson &
Talwalkar 2016). A pool is selected by H alone: Eq. 10 pulls towards the mean of whatever pool it is given, so that its
values for different pools do not compare.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hgprompt import simplex
from hgprompt.encoder import Impl, encode
from hgprompt.errors import DataError, HGPromptWarning, OptionError
from hgprompt.inputs import Prompts, num_batches, read, resolve
from hgprompt.objective import Alignment, HScore, Objective, Shrinkage, check_shrinkage
from hgprompt.pool import PromptPool
from hgprompt.progress import Progress, Reporter
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import looks_shuffled

logger = logging.getLogger(__name__)

Method = Literal["halving", "greedy", "ranking"]
_CANDIDATES = 8  # first prompts tried, of those that the uniform mixture would gain most from


@dataclass(frozen=True)
class Ranking:
    """All prompts of a pool in the order in which they are wanted.

    Attributes:
        order: prompt indices [κ], best first. weights: α [size] over the first of them, float64.
        objective: -H(α)/(C-1). h_score: H(α). intensity: of the shrinkage.
    """

    order: Tensor
    weights: Tensor
    objective: float
    h_score: float
    intensity: float


def greedy_selection(
    statistics: EnsembleStatistics,
    size: int,
    *,
    gram: Tensor | None = None,
    lam: float = 0.0,
    shrinkage: Shrinkage = "auto",
    tolerance: float = 1e-4,
) -> Ranking:
    """Greedy forward selection on the joint objective: a fully corrective Frank–Wolfe method (Jaggi 2013).

    Each step adds the prompt along which -H/(C-1) + λ L_align falls most steeply, and minimises over all prompts taken
    so far. Those not taken follow in order of their slope at the end.

    Args:
        statistics: of κ prompts. size: prompts to take, at most κ.
        gram, lam, shrinkage: as for `hgprompt.optimize_weights`.
        tolerance: Frank–Wolfe gap of each minimisation.

    Raises:
        OptionError: size is not from 1 to κ. DataError, PromptError: as for `hgprompt.optimize_weights`.
    """
    count = statistics.num_prompts
    _check_size(size, count)
    score = HScore(statistics, shrinkage=shrinkage)
    alignment = None if gram is None else Alignment(gram.detach().to("cpu", torch.float64).numpy())
    objective = Objective(score, alignment, lam)
    slopes = objective(np.full(count, 1 / count))[1]
    candidates = slopes.argsort(kind="stable")[:_CANDIDATES].tolist()
    alone = [(_objective_of(statistics, [i], score, alignment, lam)(np.ones(1))[0], i) for i in candidates]
    taken, inside = [min(alone)[1]], np.ones(1)
    while True:
        weights = np.zeros(count)
        weights[taken] = inside
        value, slopes = objective(weights)
        rest = [i for i in slopes.argsort(kind="stable").tolist() if i not in taken]
        if len(taken) == size:
            break
        taken.append(rest[0])
        part = _objective_of(statistics, taken, score, alignment, lam)
        # Not from the last solution alone: a single prompt is often a local minimum.
        starts = np.append(inside, 0.0), np.full(len(taken), 1 / len(taken))
        found = [simplex.quasi_newton(part, start, tolerance=tolerance) for start in starts]
        inside = min(found, key=lambda m: m.value).weights
    h = score.evaluate(weights)[0]
    return Ranking(torch.tensor(taken + rest), torch.from_numpy(inside), value, h, score.intensity)


def ranking_by_h_score(statistics: EnsembleStatistics, size: int, *, shrinkage: Shrinkage = "auto") -> Ranking:
    """By the H-score of each prompt alone; weights are the best ones over the first `size`."""
    count = statistics.num_prompts
    _check_size(size, count)
    score = HScore(statistics, shrinkage=shrinkage)
    alone = torch.tensor([score.evaluate(vertex)[0] for vertex in np.eye(count)], dtype=torch.float64)
    order = alone.argsort(descending=True, stable=True)
    part = _objective_of(statistics, order[:size].tolist(), score, None, 0.0)
    found = simplex.quasi_newton(part, np.full(size, 1 / size), tolerance=1e-4)
    h = part.h_score(found.weights)[0]
    return Ranking(order, torch.from_numpy(found.weights), found.value, h, score.intensity)


class SuccessiveHalving:
    """Rounds of greedy selection; after each, only the most wanted 1/factor of the prompts see more images.

    With R = ⌊log(κ/size)/log(factor)⌋ rounds of elimination, the first comes after N/factor^R images, and every later
    one after `factor` times as many; the survivors have seen every image. In all, a share of about
    (1 + R (1 - 1/factor)) / factor^R of all images × prompts goes through the network.

    Args:
        num_prompts: κ. size: prompts that are wanted in the end. num_images: N of the stream.
        factor: above 1. shrinkage: as for `hgprompt.h_score`. smallest: images before the first elimination, at least.

    Attributes:
        survivors: indices of the prompts that take part [m]. statistics: theirs, of all images so far.
        pairs: images × prompts spent. rounds: (images, prompts) at the beginning of every round.
    """

    def __init__(
        self,
        num_prompts: int,
        size: int,
        num_images: int,
        *,
        factor: float = 2.0,
        shrinkage: Shrinkage = "auto",
        smallest: int = 32,
    ) -> None:
        _check_size(size, num_prompts)
        check_shrinkage(shrinkage)
        if not factor > 1:
            raise OptionError(f"factor must be above 1, got {factor}")
        if num_images < 1:
            raise OptionError(f"num_images must be at least 1, got {num_images}")
        self.size, self.factor, self.shrinkage = size, factor, shrinkage
        self.survivors = torch.arange(num_prompts)
        self.statistics = EnsembleStatistics(keep="features")
        self.pairs = 0
        self.rounds = [(0, num_prompts)]
        count = math.floor(math.log(num_prompts / size) / math.log(factor) + 1e-9)
        # (images seen, prompts that go on)
        steps = [(num_images / factor ** (count - r), round(num_prompts / factor ** (r + 1))) for r in range(count)]
        self._eliminations = [(math.ceil(n), max(m, size)) for n, m in steps if n >= smallest]

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch: features [m, B, h] of the survivors, labels [B]; eliminate where a round is over."""
        self.statistics.update(features, labels)
        self.pairs += features.shape[0] * features.shape[1]
        while self._eliminations and self.statistics.num_images >= self._eliminations[0][0]:
            _, left = self._eliminations.pop(0)
            if not self._eliminations or self.statistics.num_images < self._eliminations[0][0]:
                self._eliminate(left)

    def finish(self) -> Ranking:
        """Greedy selection among the survivors, on all images; indices are those of the whole pool, and prompts that
        were eliminated are missing from the order."""
        found = greedy_selection(self.statistics, self.size, shrinkage=self.shrinkage)
        return dataclasses.replace(found, order=self.survivors[found.order])

    def _eliminate(self, left: int) -> None:
        if len(self.statistics.classes) < 2 or not looks_shuffled(self.statistics.features_and_labels()[1]):
            warnings.warn(
                f"the first {self.statistics.num_images} images are not a fair sample of the classes: prompts are "
                "eliminated by what comes first; shuffle the images",
                HGPromptWarning,
                stacklevel=4,
            )
        found = greedy_selection(self.statistics, min(self.size, left), shrinkage=self.shrinkage)
        kept = found.order[:left].sort().values
        logger.info("%d images: %d of %d prompts go on", self.statistics.num_images, left, len(self.survivors))
        self.survivors = self.survivors[kept]
        self.statistics = self.statistics.select(kept.tolist())
        self.rounds.append((self.statistics.num_images, left))


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select_prompts` returns.

    Attributes:
        pool: the prompts selected, most wanted first, to be mixed by `hgprompt.fast_ensemble`.
        names, indices: theirs; places in the pool that they come from.
        weights: α over them [M], by H alone. h_score, objective: H(α) and -H(α)/(C-1), on all images.
        pairs: images × prompts that went through the network. share: of all there are.
        rounds: (images seen, prompts left) at the beginning of every round.
        regret: how much larger the objective is than that of greedy selection with all prompts on all images, at that
            selection's shrinkage intensity, relative to it; NaN unless it was asked for.
    """

    pool: PromptPool
    names: tuple[str, ...]
    indices: tuple[int, ...]
    weights: Tensor
    h_score: float
    objective: float
    pairs: int
    share: float
    rounds: tuple[tuple[int, int], ...]
    regret: float


def select_prompts(
    prompts: Prompts,
    loader: Iterable[Any],
    *,
    size: int,
    backbone: nn.Module | str | None = None,
    method: Method = "halving",
    num_images: int | None = None,
    factor: float = 2.0,
    shrinkage: Shrinkage = "auto",
    full_evaluation: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | Reporter = False,
    micro_batch: int | None = None,
    impl: Impl = "auto",
) -> Selection:
    """Choose `size` prompts of a pool of hundreds for a new labelled task, in one pass over its images.

    Args:
        prompts, loader, backbone, device, dtype, progress, micro_batch, impl: as for `hgprompt.fast_ensemble`. The
            loader must be shuffled: most prompts are judged by the first images.
        size: M, prompts to select.
        method: "halving" (`SuccessiveHalving`), "greedy" (`greedy_selection`) or "ranking" (`ranking_by_h_score`); the
            latter two show every prompt every image.
        num_images: N of the loader; None: what len(loader) and the first batch say. Needed for "halving".
        factor: of "halving". shrinkage: as for `hgprompt.h_score`.
        full_evaluation: show every prompt every image all the same, to report the regret; `pairs` and `share` stay what
            the method needs.

    Raises:
        OptionError: a size beyond the pool, an unknown method, a stream of unknown length. Others as for
        `hgprompt.fast_ensemble`.
    """
    if method not in ("halving", "greedy", "ranking"):
        raise OptionError(f"method must be 'halving', 'greedy' or 'ranking', got {method!r}")
    with torch.inference_mode(False), torch.no_grad(), Progress.of(progress) as report:
        pool, stack, vit = resolve(prompts, backbone, device, dtype)
        _check_size(size, len(pool))
        stack, total = stack.to(vit.device, vit.dtype), num_batches(loader)
        halving: SuccessiveHalving | None = None
        everything = EnsembleStatistics(keep="features")
        for position, (images, labels) in enumerate(read(loader, vit), start=1):
            if method == "halving" and halving is None:
                count = num_images if num_images is not None else _expected(total, len(images))
                halving = SuccessiveHalving(len(pool), size, count, factor=factor, shrinkage=shrinkage)
            survivors = torch.arange(len(pool)) if halving is None else halving.survivors
            seen = torch.arange(len(pool)) if full_evaluation else survivors
            features = encode(vit, stack[seen.to(vit.device)], images, micro_batch=micro_batch, impl=impl)
            if halving is None or full_evaluation:
                everything.update(features, labels)
            if halving is not None:
                halving.update(features[survivors.to(vit.device)] if full_evaluation else features, labels)
            report("images", position, total)
        statistics = everything if halving is None else halving.statistics
        if not statistics.num_images:
            raise DataError("the loader gave no images")
        report("selection", 0, None)
        if halving is not None:
            found = halving.finish()
        else:
            choose = greedy_selection if method == "greedy" else ranking_by_h_score
            found = choose(statistics, size, shrinkage=shrinkage)
        chosen = found.order[:size].tolist()
        regret = regret_of(everything, chosen, shrinkage=shrinkage) if full_evaluation else math.nan
    all_pairs = statistics.num_images * len(pool)
    pairs = all_pairs if halving is None else halving.pairs
    return Selection(
        pool=pool.subset([pool.names[i] for i in chosen]),
        names=tuple(pool.names[i] for i in chosen),
        indices=tuple(chosen),
        weights=found.weights,
        h_score=found.h_score,
        objective=found.objective,
        pairs=pairs,
        share=pairs / all_pairs,
        rounds=((0, len(pool)),) if halving is None else tuple(halving.rounds),
        regret=regret,
    )


def regret_of(
    statistics: EnsembleStatistics, chosen: Sequence[int], *, shrinkage: Shrinkage = "auto", tolerance: float = 1e-4
) -> float:
    """How much is lost by these prompts: their objective less that of greedy selection among all, relative to it.

    Args:
        statistics: of all prompts and images. chosen: indices of the prompts judged.
        shrinkage, tolerance: as for `greedy_selection`; one intensity, that of the whole pool, serves both.

    Returns:
        0 where both are equally good; below 0 where greedy selection did worse.
    """
    best = greedy_selection(statistics, len(chosen), shrinkage=shrinkage, tolerance=tolerance)
    part = Objective(HScore(statistics.select(chosen), shrinkage=best.intensity), None, 0.0)
    uniform = np.full(len(chosen), 1 / len(chosen))
    starts = simplex.starting_points(part, len(chosen), 4, seed=0)
    found = min(simplex.quasi_newton(part, start, tolerance=tolerance).value for start in [uniform, *starts])
    return (found - best.objective) / abs(best.objective)


def _objective_of(
    statistics: EnsembleStatistics, prompts: Sequence[int], score: HScore, alignment: Alignment | None, lam: float
) -> Objective:
    """The objective of some prompts of a pool, at the pool's intensity."""
    if alignment is not None:
        alignment = Alignment(alignment.gram[np.ix_(prompts, prompts)])
    return Objective(HScore(statistics.select(prompts), shrinkage=score.intensity), alignment, lam)


def _check_size(size: int, count: int) -> None:
    if not 1 <= size <= count:
        raise OptionError(f"size must be from 1 to the {count} prompts of the pool, got {size}")


def _expected(batches: int | None, batch: int) -> int:
    if batches is None:
        raise OptionError("the loader does not say how long it is: pass num_images, which halving plans its rounds by")
    return batches * batch
