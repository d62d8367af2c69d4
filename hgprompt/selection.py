"""Which M prompts of a large pool are worth mixing.

Three ways, from cheap to thorough: by the H-score of each prompt alone, which takes twins of the best; by successive
halving (Karnin, Koren & Somekh 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson & Talwalkar 2016),
which shows most prompts only a few of the images and selects greedily among those that are left; and greedily among all
(`hgprompt.greedy`). A pool is selected by H alone: Eq. 10 pulls towards the mean of whatever pool it is given, so that
its values for different pools do not compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hgprompt import operations
from hgprompt.arguments import real, whole
from hgprompt.distributed import Ranks, slices
from hgprompt.encoder import Impl, MicroBatch, encode
from hgprompt.errors import DataError, OptionError, warn
from hgprompt.greedy import (
    Ranking,
    alone_scores,
    check_size,
    greedy_selection,
    in_turn,
    mixture_of,
    ranking_by_h_score,
)
from hgprompt.inputs import Prompts, digest, gpu_of, images_in, num_batches, read, resolve, same_batches
from hgprompt.kernels.compiler import copied
from hgprompt.objective import HScore, Shrinkage, check_shrinkage
from hgprompt.one_pass import READING
from hgprompt.pool import PromptPool
from hgprompt.progress import Progress, Reporter
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import looks_shuffled
from hgprompt.workers import reading

logger = logging.getLogger(__name__)

Method = Literal["halving", "greedy", "ranking"]
_FINAL_SHARE = 0.5  # of halving's budget, for those prompts that see every image
_FINALISTS = 32  # may be as many as that, however few are wanted


class SuccessiveHalving:
    """Rounds after each of which only the more promising half of the prompts see more images; then greedy selection.

    Every elimination comes after twice as many images as the one before, and the survivors of the last see all N. Few
    images tell poor prompts from good ones; which of the good go best together takes many, and one that is missing may
    cost several per cent. So half of the budget goes to the survivors: they are m_R = budget · κ / 2, though no fewer
    than `size` and, for the sake of what selecting among them takes, no more than 4 · size (or 32). The others go in
    R = log₂(κ/m_R) eliminations, R rounded and all of one ratio. When the first comes follows from the budget:

        budget · κ = m_R + Σ_r t_r (m_r - m_{r+1}),   t_r = t_0 2^r,   m_r prompts in round r from 0 to R,

    where t_r is the share of the images that was seen; an elimination with t_r ≥ 1 is left out. Eliminations are at the
    end of the last batch that is in time, so that the budget is kept by batches of one size, no larger than the first
    round.

    Args:
        num_prompts: κ. size: prompts that are wanted in the end. num_images: N of the stream.
        budget: share of all images × prompts to spend, at most, above size/κ. None: a quarter; or, where that is more,
            (1 + r/2)/2^r with r = ⌊log₂(κ/size)⌋, as in pools less than 16 times as large as the selection: what
            halving costs whose every round costs the same.
        shrinkage: as for `hgprompt.h_score`. smallest: images before the first elimination, at least.

    Attributes:
        survivors: indices of the prompts that take part [m]. statistics: theirs, of all images so far.
        pairs: images × prompts spent. rounds: (images, prompts) at the beginning of every round.

    Raises:
        OptionError: a size beyond the pool, a budget that cannot be kept.
    """

    def __init__(
        self,
        num_prompts: int,
        size: int,
        num_images: int,
        *,
        budget: float | None = None,
        shrinkage: Shrinkage = "auto",
        smallest: int = 32,
    ) -> None:
        check_size(size, num_prompts)
        check_shrinkage(shrinkage)
        if num_images < 1:
            raise OptionError(f"num_images must be at least 1, got {num_images}")
        self.size, self.shrinkage = size, shrinkage
        self._count, self._announced = num_prompts, num_images
        self.survivors = torch.arange(num_prompts, device="cpu")
        self.statistics = EnsembleStatistics(keep="features")
        self.pairs = 0
        self.rounds = [(0, num_prompts)]
        # (images seen, prompts that go on)
        self._eliminations = [
            (share * num_images, left)
            for share, left in _schedule(num_prompts, size, budget)
            if share * num_images >= smallest
        ]

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch: features [m, B, h] of the survivors, labels [B]; eliminate where a round is over."""
        self.statistics.update(features, labels)
        self.pairs += features.shape[0] * features.shape[1]
        next_look = self.statistics.num_images + len(labels)
        while self._eliminations and next_look > self._eliminations[0][0] + 1e-6:
            _, left = self._eliminations.pop(0)
            if not self._eliminations or next_look <= self._eliminations[0][0] + 1e-6:
                self._eliminate(left)

    def finish(self) -> Ranking:
        """Greedy selection among the survivors, on all images; indices are those of the whole pool, and prompts that
        were eliminated are missing from the order."""
        if self._eliminations:
            warn(
                f"the stream ended after {self.statistics.num_images} images, where num_images says "
                f"{self._announced}: {len(self._eliminations)} elimination(s) did not take place, and more was "
                "spent than halving would have; pass the right num_images"
            )
        found = greedy_selection(self.statistics, self.size, shrinkage=self.shrinkage)
        alone = torch.full((self._count,), torch.nan, dtype=torch.float64, device="cpu")
        alone[self.survivors] = found.alone
        return dataclasses.replace(found, order=self.survivors[found.order], alone=alone)

    def _eliminate(self, left: int) -> None:
        if len(self.statistics.classes) < 2:
            raise DataError(
                f"the first {self.statistics.num_images} images are all of class {self.statistics.classes[0]}: "
                "prompts cannot be judged by them; shuffle the images"
            )
        if not looks_shuffled(self.statistics.features_and_labels()[1]):
            warn(
                f"the first {self.statistics.num_images} images are not a fair sample of the classes: prompts are "
                "eliminated by what comes first; shuffle the images"
            )
        kept = torch.tensor(_promising(self.statistics, self.shrinkage)[:left], device="cpu").sort().values
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
    budget: float | None = None,
    shrinkage: Shrinkage = "auto",
    full_evaluation: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | Reporter = False,
    process_group: Any = None,
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
        num_images: N of the loader; None: what the loader and its first batch say. "halving" needs it where
            the loader has no length.
        budget: of "halving", as for `SuccessiveHalving`. shrinkage: as for `hgprompt.h_score`.
        full_evaluation: show every prompt every image all the same, to report the regret; `pairs` and `share` stay what
            the method needs.
        process_group: a torch.distributed group whose ranks share the prompts: every rank calls this alike and reads
            all images, in the same batches, and returns the same bits (docs/scaling.md). None: this process alone.

    Raises:
        OptionError: a size beyond the pool, an unknown method, a stream of unknown length. Others as for
        `hgprompt.fast_ensemble`.
    """
    ranks = Ranks(process_group, gpu_of(device, backbone))
    with torch.inference_mode(False), torch.no_grad(), Progress.of(progress) as report:
        with ranks.together("checking the arguments"):
            if method not in ("halving", "greedy", "ranking"):
                raise OptionError(f"method must be 'halving', 'greedy' or 'ranking', got {method!r}")
            pairs = MicroBatch(micro_batch)  # one for all batches: what a GPU had no memory for is not tried again
            pool, stack, vit = resolve(prompts, backbone, device, dtype)
            size = whole("size", size)
            check_size(size, len(pool))
            num_images = None if num_images is None else whole("num_images", num_images)
            budget = None if budget is None else real("budget", budget)
            shrinkage = shrinkage if isinstance(shrinkage, str) else real("shrinkage", shrinkage)
            check_shrinkage(shrinkage)
            operations.select(vit, impl)
        if not ranks.alone:
            network = f"{vit.name} {vit.image_size} {vit.fingerprint} {vit.dtype}"
            options: dict[str, Any] = {"size": size, "method": method, "num_images": num_images, "budget": budget}
            options |= {"shrinkage": shrinkage, "full_evaluation": full_evaluation}
            ranks.agree({"prompts": digest(pool), "backbone": network} | options)
        stack, total = stack.to(vit.device, vit.dtype), num_batches(loader)
        halving: SuccessiveHalving | None = None
        everything = EnsembleStatistics(keep="features")
        with reading(), contextlib.closing(read(loader, vit)) as own:
            batches = own if ranks.alone else same_batches(own, ranks, READING)
            for position, (images, labels) in enumerate(batches, start=1):
                with ranks.together(READING):
                    if ranks.first and method == "halving" and halving is None:
                        count = num_images if num_images is not None else _expected(loader, len(images))
                        halving = SuccessiveHalving(len(pool), size, count, budget=budget, shrinkage=shrinkage)
                if position == 1 and total is not None:
                    everything.expect(images_in(loader, total, len(images)))
                # The first rank keeps and decides everything; the others are its network.
                survivors = torch.arange(len(pool), device="cpu") if halving is None else halving.survivors
                survivors = ranks.broadcast({"survivors": survivors})[0]["survivors"]
                seen = torch.arange(len(pool), device="cpu") if full_evaluation else survivors
                with ranks.together(READING):
                    mine = seen[slices(len(seen), ranks.world)[ranks.rank]]
                    features = torch.zeros(0, len(images), vit.width, dtype=vit.dtype, device=vit.device)
                    if len(mine):
                        features = encode(vit, stack[copied(mine, vit.device)], images, micro_batch=pairs, impl=impl)
                features = torch.cat(ranks.gather(features))
                with ranks.together(READING):
                    if ranks.first and (halving is None or full_evaluation):
                        everything.update(features, labels)
                    if halving is not None:
                        halving.update(features[copied(survivors, vit.device)] if full_evaluation else features, labels)
                report("images", position, total)
        report("selection", 0, None)
        chosen: dict[str, Any] | None = None
        with ranks.together("selecting"):
            if ranks.first:
                weights, chosen = _selected(halving, everything, len(pool), size, method, shrinkage, full_evaluation)
        tensors, chosen = ranks.broadcast(None if chosen is None else {"weights": weights}, chosen)
    assert chosen is not None
    names = tuple(pool.names[i] for i in chosen["indices"])
    return Selection(
        pool=pool.subset(list(names)),
        names=names,
        weights=tensors["weights"],
        indices=tuple(chosen.pop("indices")),
        rounds=tuple((images, prompts) for images, prompts in chosen.pop("rounds")),
        **chosen,
    )


def _selected(
    halving: SuccessiveHalving | None,
    everything: EnsembleStatistics,
    count: int,
    size: int,
    method: Method,
    shrinkage: Shrinkage,
    full_evaluation: bool,
) -> tuple[Tensor, dict[str, Any]]:
    """Weights of the prompts selected, and the numbers of a `Selection`, JSON-able."""
    statistics = everything if halving is None else halving.statistics
    if not statistics.num_images:
        raise DataError("the loader gave no images")
    if halving is not None:
        found = halving.finish()
    else:
        choose = greedy_selection if method == "greedy" else ranking_by_h_score
        found = choose(statistics, size, shrinkage=shrinkage)
    chosen = found.order[:size].tolist()
    regret = math.nan
    if full_evaluation:
        best = greedy_selection(everything, size, shrinkage=shrinkage)
        regret = regret_of(everything, chosen, best, warm=[found.weights])
    all_pairs = statistics.num_images * count
    pairs = all_pairs if halving is None else halving.pairs
    return found.weights, {
        "indices": chosen, "h_score": found.h_score, "objective": found.objective, "pairs": pairs,
        "share": pairs / all_pairs, "rounds": [(0, count)] if halving is None else halving.rounds, "regret": regret,
    }  # fmt: skip


def regret_of(
    statistics: EnsembleStatistics, chosen: Sequence[int], best: Ranking, *, warm: Sequence[Tensor] = ()
) -> float:
    """How much is lost by these prompts: their objective (by H alone) less that of another selection, relative to it.

    Args:
        statistics: of all prompts and images. chosen: indices of the prompts judged.
        best: of the same statistics by H alone; its intensity serves both.
        warm: weights over the prompts judged to start from too, as of who chose them: what eight starts of a dozen
            prompts find can be several per cent from what they can do.

    Returns:
        0 where both are equally good; below 0 where the other selection did worse.
    """
    found = mixture_of(statistics, chosen, intensity=best.intensity, warm=warm).diagnostics
    return (found.objective - best.objective) / abs(best.objective)


def _schedule(count: int, size: int, budget: float | None) -> list[tuple[float, int]]:
    """(share of the images seen, prompts that go on) at each elimination, see `SuccessiveHalving`."""
    if budget is not None and not 0 < budget <= 1:
        raise OptionError(f"budget must be above 0 and at most 1, a share of images × prompts, got {budget}")
    halvings = math.floor(math.log2(count / size) + 1e-9)
    if not halvings:
        if budget is not None and budget < 1:
            raise OptionError(f"{size} of {count} prompts leave nothing to halve: budget must be 1, or left out")
        return []
    if budget is None:
        budget = max(0.25, (1 + halvings / 2) / 2**halvings)
    if budget * count <= size:
        raise OptionError(
            f"a budget of {budget} is used up by the {size} prompts wanted of {count}, which see every image: "
            f"it must be above {size / count:.3g}"
        )
    final = max(min(int(_FINAL_SHARE * budget * count), max(4 * size, _FINALISTS)), size)
    rounds = max(round(math.log2(count / final)), 1)
    left = [round(count * (final / count) ** (r / rounds)) for r in range(rounds + 1)]
    first = (budget * count - final) / sum(2**r * (left[r] - left[r + 1]) for r in range(rounds))
    return [(first * 2**r, left[r + 1]) for r in range(rounds) if first * 2**r < 1]


def _promising(statistics: EnsembleStatistics, shrinkage: Shrinkage) -> list[int]:
    """Prompts in the order in which few images speak for them, each alone.

    Few images know the trace of the covariance far better than its directions, and then the H-score of the covariance's
    target, tr Σ_between / tr Σ, tells good from poor with a fraction of the images that H takes. But it is blind to
    classes that differ along directions of little variance; so the first by either go on, in turn.
    """
    score = HScore(statistics, shrinkage=shrinkage)
    ratio = score.mixture.r.square().sum((1, 2)) / score.mixture.spread
    alone = alone_scores(score, statistics.num_prompts)
    return in_turn(ratio.argsort(descending=True, stable=True).tolist(), (-alone).argsort(kind="stable").tolist())


def _expected(loader: Iterable[Any], first: int) -> int:
    batches = num_batches(loader)
    if batches is None:
        raise OptionError("the loader does not say how long it is: pass num_images, which halving plans its rounds by")
    return images_in(loader, batches, first)
