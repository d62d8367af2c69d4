"""Streaming class-conditional statistics of the features of M prompts.

Two exact representations of the same problem: the features themselves (N·M·h numbers), or their moments (second
moments of every pair of prompts and class sums, about M²h²/2 + C·M·h numbers). Where the number of images is known
beforehand, the smaller one is chosen with the first batch; else features are kept until moments are smaller. Everything
after the network is float64: it costs nothing beside the network.

Letters in shapes: M prompts, B images of a batch, N images in all, h feature width, C observed classes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hgprompt.arguments import is_floating, kind_of, whole
from hgprompt.batch_checks import FiniteCheck, check_labels
from hgprompt.distributed import Ranks, default_group
from hgprompt.errors import OptionError, StatisticsError
from hgprompt.kept_features import KeptFeatures
from hgprompt.memory import Keep, Representation, Room
from hgprompt.moments import Moments, add_by_fold, merged, mixed
from hgprompt.sample import folds_of

logger = logging.getLogger(__name__)

_STAGE = "merging the statistics"


class EnsembleStatistics:
    """What one pass over the data leaves behind.

    Batch size, order and split of the stream do not matter (beyond the last bits), except that an image's place in it
    says to which fold it goes, which only the uncertainty of a result and the cross-fitting of heads depend on.

    Args:
        folds: groups of images that can be left out again (`without_fold`), for jackknife errors and cross-fitting.
            Moments are kept once per fold.
        keep: "features", "moments", or "auto": whichever takes fewer bytes.
        max_bytes: memory that the statistics and their solve may take (`hgprompt.footprint`); None: what the device of
            the first batch has free, less a fifth.
        shard: (r, W): this stream is every W-th image of a larger one, from image r on, as a DistributedSampler deals
            them: its image n has the number r + nW there. Only folds depend on it.
    """

    def __init__(
        self,
        *,
        folds: int = 1,
        keep: Keep = "auto",
        max_bytes: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        folds, max_bytes = whole("folds", folds), None if max_bytes is None else whole("max_bytes", max_bytes)
        if folds < 1:
            raise OptionError(f"folds must be at least 1, got {folds}")
        if keep not in ("auto", "features", "moments"):
            raise OptionError(f"keep must be 'auto', 'features' or 'moments', got {keep!r}")
        if max_bytes is not None and max_bytes < 1:
            raise OptionError(f"max_bytes must be at least 1, got {max_bytes}")
        if shard[0] < 0 or shard[1] < 1:
            raise OptionError(f"shard must be (r, W), for every W-th image from image r on, got {shard}")
        self.folds = folds
        self.keep: Keep = keep
        self.max_bytes = max_bytes
        self.shard = shard
        self._room = Room(keep, max_bytes, folds)
        self._num_images = 0
        self._shape: tuple[int, int] | None = None
        self._dtype = torch.float64
        self._classes: set[int] = set()
        self._features = KeptFeatures()
        self._moments: list[Moments] | None = None
        self._finite = FiniteCheck()

    @property
    def num_images(self) -> int:
        """N, images seen."""
        return self._num_images

    @property
    def num_prompts(self) -> int:
        """M."""
        return self._require_shape()[0]

    @property
    def width(self) -> int:
        """h."""
        return self._require_shape()[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features that came in first."""
        self._require_shape()
        return self._dtype

    @property
    def classes(self) -> tuple[int, ...]:
        """Observed labels, ascending."""
        return tuple(sorted(self._classes))

    @property
    def keeps(self) -> Representation:
        """The representation in use now."""
        return "features" if self._moments is None else "moments"

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._features.nbytes + sum(m.nbytes for m in self._moments or [])

    @property
    def _device(self) -> torch.device:
        """Where the statistics are."""
        if self._features:
            return self._features.batches[0][0].device
        centres = [m.centre for m in self._moments or [] if m.centre is not None]
        return centres[0].device if centres else torch.device("cpu")

    def expect(self, num_images: int) -> None:
        """Say how many images will come, about: what is kept is then chosen, or refused, with the first batch."""
        self._room.expected = num_images

    @torch.inference_mode(False)  # what is kept is added to later, perhaps outside a caller's inference mode
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in one batch.

        Args:
            features: [M, B, h], floating point and finite; kept in their dtype, on their device.
            labels: [B], integers, at least 0.

        Raises:
            StatisticsError: shape or dtype differ from those of earlier batches, or neither representation has room.
            DataError: labels that are no class indices, or features that are not finite.
        """
        if not is_floating(features, 3) or not features.shape[0] or not features.shape[2]:
            raise StatisticsError(f"features must be floating point [M, B, h], got {kind_of(features)}")
        labels = check_labels(labels, features.shape[1])
        shape = features.shape[0], features.shape[2]
        dtype = features.dtype
        if self._shape is not None and (self._shape, self._dtype) != (shape, dtype):
            raise StatisticsError(
                f"features are of (M, h) = {shape} in {dtype}, earlier batches were of {self._shape} in {self._dtype}"
            )
        batch = features.shape[1]
        new = set(labels.unique().tolist()) - self._classes
        num_classes = len(self._classes) + len(new)
        self._finite.check(features, self._num_images)
        chosen = self._representation(shape, dtype, self._num_images + batch, num_classes, features.device)
        # A batch that is refused, above, says nothing of what is to come.
        self._shape, self._dtype = shape, dtype
        if self._num_images == 0:
            logger.info("%s", self._room.plan(shape, dtype, batch, num_classes))
        fold_of = self.next_folds(batch)
        self._num_images += batch
        self._classes |= new
        if self._moments is None:
            self._features.add(features.detach().clone(), labels, fold_of)
            if chosen == "moments":
                self._to_moments()
        else:
            add_by_fold(self._moments, features.detach(), labels, fold_of)

    def next_folds(self, batch: int) -> Tensor:
        """Folds of the next `batch` images [batch], int32."""
        first, step = self.shard
        places = first + step * np.arange(self._num_images, self._num_images + batch)
        return torch.from_numpy(folds_of(places, self.folds)).to(torch.int32)

    def select(self, prompts: Sequence[int]) -> EnsembleStatistics:
        """Statistics of these prompts alone, in this order; features are copied, nothing is shared.

        Errors about features that are not finite still name a prompt by its number here.

        Raises:
            StatisticsError: only moments are kept: what Ledoit–Wolf's intensity needs of another mixture is not there.
        """
        features, labels = self.features_and_labels()
        part = self._like_this()
        part._num_images, part._shape, part._dtype = self._num_images, (len(prompts), self.width), self._dtype
        part._classes = set(self._classes)
        part._features.add(features[list(prompts)], labels, self.fold_of)
        numbers = self._finite.numbers
        part._finite.numbers = list(prompts) if numbers is None else [numbers[i] for i in prompts]
        return part

    @torch.inference_mode(False)
    def merge(self, other: EnsembleStatistics) -> None:
        """Take in what another pass over other images has gathered; `other` stays as it is.

        Raises:
            StatisticsError: other prompts, feature widths, dtypes or folds, or no room; nothing is changed then.
        """
        if not isinstance(other, EnsembleStatistics):
            raise StatisticsError(f"only EnsembleStatistics can be merged, got {type(other).__name__}")
        self._finite.finish()
        other._finite.finish()
        if other._shape is None:
            return
        kinds = {(one._shape, one._dtype) for one in (self, other) if one._shape is not None}
        if len(kinds) > 1 or self.folds != other.folds:
            raise StatisticsError(
                f"cannot merge statistics of (M, h) = {other._shape} in {other._dtype} and {other.folds} folds into "
                f"those of {self._shape or ('-', '-')} in {self._dtype if self._shape else '-'} and {self.folds}"
            )
        num_images, classes = self._num_images + other._num_images, self._classes | other._classes
        chosen = self._room.fitting(
            other._shape, other._dtype, num_images, len(classes),
            device=(other if self._shape is None else self)._device, held=lambda: self.nbytes,
            keep="moments" if "moments" in (self.keeps, other.keeps) else self.keep,
        )[0]  # fmt: skip
        self._shape, self._dtype, self._num_images, self._classes = other._shape, other._dtype, num_images, classes
        if self._moments is None and other._moments is None:
            self._features.batches += other._features.batches
            if chosen == "moments":
                self._to_moments()
            return
        if self._moments is None:
            self._to_moments()
        assert self._moments is not None
        if other._moments is None:
            for batch in other._features:
                add_by_fold(self._moments, *batch)
        else:
            for mine, theirs in zip(self._moments, other._moments, strict=True):
                mine.merge(theirs)

    def reduced(self, group: Any) -> EnsembleStatistics:
        """As `all_reduce`, and leave these statistics as they are: a new object."""
        whole = copy.copy(self)
        # What is changed in place: by all_reduce, and by updates of these.
        whole._moments, whole._room = copy.deepcopy((self._moments, self._room))
        whole._features = KeptFeatures(self._features.batches)
        whole.all_reduce(group)
        return whole

    @torch.inference_mode(False)
    def all_reduce(self, group: Any = None) -> None:
        """Take in the statistics of all ranks of a torch.distributed group, on every rank, exactly.

        Ranks may hold different numbers of images and classes, also none, and keep features or moments: features stay
        features, in rank order, where no rank has moments and there is room for all of them; else all keep moments.
        Memory grows to what the images of all ranks take together, and not with the number of ranks. Fold numbers stay
        as the ranks dealt them.

        Args:
            group: None: the default group. hgprompt's own `Ranks` will do as well.

        Raises:
            StatisticsError: no rank has seen an image, ranks disagree in the shapes of what they keep, or there is no
                room; on every rank. DistributedError: torch.distributed is not initialised, or a rank is gone.
        """
        ranks = group if isinstance(group, Ranks) else Ranks(group or default_group())
        if ranks.alone:
            return
        with ranks.together(_STAGE):
            self._finite.finish()
        shape, dtype, total = self._common(ranks)
        self._shape, self._dtype = shape, dtype
        mine = torch.tensor(self.classes, dtype=torch.int64, device="cpu")
        classes = {int(c) for part in ranks.gather(mine) for c in part}
        if "moments" in ranks.gather_json(self.keeps):
            keep: Keep = "moments"
        else:
            keep = self.keep
        with ranks.together(_STAGE):
            kinds = self._room.fitting(
                shape, dtype, total, len(classes), device=self._device, held=lambda: self.nbytes, keep=keep
            )
        chosen = self._chosen_by_all(ranks.gather_json(kinds))
        device = self._device
        if chosen == "features":
            self._features = self._features.of_all(ranks, shape, dtype)
        else:
            with ranks.together(_STAGE):
                if self._moments is None:
                    self._to_moments()
            assert self._moments is not None
            centre = _mean(self._moments, ranks, total).to(device)
            for part in self._moments:
                part.all_reduce(ranks, centre, sorted(classes))
        self._num_images, self._classes = total, classes

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers that `load_state_dict` takes back; features as one tensor."""
        self._finite.finish()
        state: dict[str, Any] = {
            "version": 1,
            "folds": self.folds,
            "num_images": self._num_images,
            "shape": self._shape,
        }
        state["dtype"] = str(self._dtype).removeprefix("torch.")
        if self._moments is not None:
            state["moments"] = [m.state_dict() for m in self._moments]
        elif self._features:
            parts = zip(*self._features, strict=True)
            state["features"], state["labels"], state["fold_of"] = (
                torch.cat(part, dim) for part, dim in zip(parts, (1, 0, 0), strict=True)
            )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by a state of `state_dict`.

        Raises:
            StatisticsError: the state is of another version or number of folds, or contradicts itself.
        """
        if not isinstance(state, Mapping):
            raise StatisticsError(f"a state is a mapping, as `state_dict` makes it, got {type(state).__name__}")
        if state.get("version") != 1 or state.get("folds") != self.folds:
            raise StatisticsError(
                f"state has version {state.get('version')} and {state.get('folds')} folds; expected 1 and {self.folds}"
            )
        try:
            loaded = self._loaded(state)
        except StatisticsError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise StatisticsError(f"state is incomplete or not understood: {error!r:.200}") from error
        self.__dict__.update(loaded.__dict__)

    def _loaded(self, state: Mapping[str, Any]) -> EnsembleStatistics:
        shape = state["shape"]
        loaded = self._like_this()
        loaded._shape = None if shape is None else (int(shape[0]), int(shape[1]))
        loaded._num_images = int(state["num_images"])
        loaded._dtype = getattr(torch, state["dtype"])
        if shape is not None and not (isinstance(loaded._dtype, torch.dtype) and loaded._dtype.is_floating_point):
            raise StatisticsError(f"state has features of dtype {state['dtype']!r:.80}")
        if "moments" in state:
            loaded._moments = [Moments.from_state_dict(m) for m in state["moments"]]
            if len(loaded._moments) != self.folds or sum(m.count for m in loaded._moments) != loaded._num_images:
                raise StatisticsError("state contradicts itself: moments do not add up to its number of images")
            if any((m.num_prompts, m.width) != loaded._shape for m in loaded._moments):
                raise StatisticsError(f"state contradicts itself: moments that are not of (M, h) = {loaded._shape}")
            loaded._classes = {c for m in loaded._moments for c in m.class_sums}
        elif loaded._shape is not None:
            features, labels, fold_of = (state[k] for k in ("features", "labels", "fold_of"))
            expected = (loaded._shape[0], loaded._num_images, loaded._shape[1])
            if tuple(features.shape) != expected or len(labels) != len(fold_of) or len(labels) != expected[1]:
                raise StatisticsError(f"state contradicts itself: features {list(features.shape)}, expected {expected}")
            if fold_of.is_floating_point() or features.dtype != loaded._dtype:
                raise StatisticsError(f"state has folds of {fold_of.dtype}, features of {features.dtype}")
            labels = check_labels(labels, expected[1])
            if len(fold_of) and not (int(fold_of.min()) >= 0 and int(fold_of.max()) < self.folds):
                raise StatisticsError(f"state has images of folds that are not there: there are {self.folds}")
            loaded._features.add(features.clone(), labels.clone(), fold_of.clone())
            loaded._classes = set(labels.unique().tolist())
        return loaded

    def kept(self) -> list[Tensor] | list[Moments]:
        """What is kept, not copied: features [M, b, h] batch by batch, or the moments of every fold."""
        self._finite.finish()
        return [features for features, _, _ in self._features] if self._moments is None else self._moments

    def restore(self, labels: Tensor, kept: list[Tensor] | list[Moments], dtype: torch.dtype) -> None:
        """Take the place of a pass whose images had these labels [N], and which kept this of features of this dtype,
        and go on to the same bits.

        Raises:
            StatisticsError: they do not fit together.
        """
        restored, first = self._like_this(), kept[0]
        folds = restored.next_folds(len(labels))
        restored._num_images, restored._classes = len(labels), set(labels.unique().tolist())
        restored._room.expected = self._room.expected
        if isinstance(first, Moments):
            moments = [m for m in kept if isinstance(m, Moments)]
            counts = [folds.eq(k).sum().item() for k in range(self.folds)]
            if [m.count for m in moments] != counts:
                raise StatisticsError(f"moments of {[m.count for m in moments]} images by fold, expected {counts}")
            restored._moments, restored._shape = moments, (first.num_prompts, first.width)
        else:
            batches = [f for f in kept if isinstance(f, Tensor)]
            sizes = [f.shape[1] for f in batches]
            if sum(sizes) != len(labels):
                raise StatisticsError(f"features of {sum(sizes)} images, labels of {len(labels)}")
            restored._shape = len(first), first.shape[2]
            for batch in zip(batches, labels.split(sizes), folds.split(sizes), strict=True):
                restored._features.add(*batch)
        restored._dtype = dtype
        self.__dict__.update(restored.__dict__)

    def h_score(self, weights: Tensor, *, shrinkage: Any = "auto") -> float:
        """H(α) of the mixed features Σα_i f_i (Eqs. 4 and 5); shrinkage as for `hgprompt.h_score`.

        Raises:
            OptionError: weights that are not [M], not finite, or all 0. DataError, PromptError: as for
                `hgprompt.objective.HScore`.
        """
        from hgprompt.objective import HScore

        weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu").detach()
        if weights.shape != (self.num_prompts,):
            raise OptionError(f"weights must be [{self.num_prompts}], got {list(weights.shape)}")
        largest = weights.abs().max()
        if not 0 < float(largest) < math.inf:
            raise OptionError(f"weights must be finite and not all 0, got {weights.tolist()[:8]}")
        return HScore(self, shrinkage=shrinkage)((weights / largest).numpy())[0]

    def features_and_labels(self, without_fold: int | None = None) -> tuple[Tensor, Tensor]:
        """Kept features [M, N, h] in their dtype and labels [N], optionally without one fold.

        Raises:
            StatisticsError: only moments are kept, or there are no images yet.
        """
        features, labels, fold_of = self._kept()
        if without_fold is not None:
            chosen = fold_of != without_fold
            features, labels = features[:, chosen.to(features.device)], labels[chosen]
        return features, labels

    @property
    def fold_of(self) -> Tensor:
        """Fold of each image of `features_and_labels` [N]; its errors, too."""
        return self._kept()[2]

    def moments(self, without_fold: int | None = None) -> Moments:
        """Moments of all images, optionally without one fold (a new object, whatever is kept)."""
        if self._moments is None:
            moments = Moments(*self._require_shape())
            moments.update(*self.features_and_labels(without_fold))
            return moments
        return merged(self._moments, without_fold)

    def prompt_moments(self, prompt: int) -> list[Moments]:
        """Moments of one prompt's features alone, fold by fold."""
        if self._moments is not None:
            return [m.of_prompt(prompt) for m in self._moments]
        return self._fold_moments(lambda f: f[prompt : prompt + 1])

    def mixture_moments(self, weights: Tensor | None = None) -> list[Moments]:
        """Moments of the mixture Σ α_i f_i (None: the uniform one), fold by fold."""
        if self._moments is not None:
            return [m.of_mixture(weights) for m in self._moments]
        if weights is None:
            m = self.num_prompts
            weights = torch.full((m,), 1 / m, dtype=torch.float64, device="cpu")
        return self._fold_moments(lambda f: mixed(f, weights)[None])

    def _kept(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._moments is not None:
            raise StatisticsError("features are no longer kept: moments took their place (keep='features' keeps them)")
        self._require_shape()
        return self._features.joined()

    def _fold_moments(self, select: Callable[[Tensor], Tensor]) -> list[Moments]:
        self._features.joined()
        return self._features.moments(self.folds, select)

    def _require_shape(self) -> tuple[int, int]:
        self._finite.finish()
        if self._shape is None:
            raise StatisticsError("no images yet: the statistics are empty")
        return self._shape

    def _like_this(self) -> EnsembleStatistics:
        """Empty statistics with the same options."""
        return EnsembleStatistics(folds=self.folds, keep=self.keep, max_bytes=self.max_bytes, shard=self.shard)

    def _common(self, ranks: Ranks) -> tuple[tuple[int, int], torch.dtype, int]:
        """(M, h) and dtype of all ranks' features, and the number of their images."""
        mine = [self._shape, str(self._dtype).removeprefix("torch."), self.folds, self._num_images]
        everyone = [(rank, *part) for rank, part in enumerate(ranks.gather_json(mine))]
        seen = [part for part in everyone if part[1] is not None]
        if not seen:
            raise StatisticsError("no rank has seen an image")
        for part in everyone:
            if (part[1] is not None and part[1:3] != seen[0][1:3]) or part[3] != seen[0][3]:
                raise StatisticsError(
                    f"ranks {seen[0][0]} and {part[0]} cannot be merged: their [M, h], dtype and folds are "
                    f"{seen[0][1:4]} and {part[1:4]}"
                )
        return (seen[0][1][0], seen[0][1][1]), getattr(torch, seen[0][2]), sum(part[4] for part in everyone)

    def _chosen_by_all(self, by_rank: list[list[Representation]]) -> Representation:
        """The first representation that every rank has room for."""
        for kind in by_rank[0]:
            if all(kind in kinds for kinds in by_rank):
                return kind
        # One rank was told to keep features and another moments, or each has room for something else.
        raise StatisticsError(f"ranks cannot keep the same: in their order, they can keep {by_rank}; pass one keep=")

    def _representation(
        self, shape: tuple[int, int], dtype: torch.dtype, num_images: int, num_classes: int, device: torch.device
    ) -> Representation:
        """What to keep of so many images, or of as many as are expected; StatisticsError where there is no room."""
        keep: Keep = self.keep if self._moments is None else "moments"
        return self._room.fitting(
            shape, dtype, num_images, num_classes, device=device, held=lambda: self.nbytes, keep=keep
        )[0]

    def _to_moments(self) -> None:
        shape = self._require_shape()
        moments = self._features.moments(self.folds) or [Moments(*shape) for _ in range(self.folds)]
        logger.info("%d images: moments take the place of features from here on", self._num_images)
        self._moments, self._features = moments, KeptFeatures()


def _mean(moments: Sequence[Moments], ranks: Ranks, total: int) -> Tensor:
    """Mean [M, h] of the features of all ranks, with the same bits on every rank."""
    mine = torch.zeros(moments[0].sums.shape, dtype=torch.float64, device="cpu")
    for part in moments:
        if part.centre is not None:
            mine += (part.sums + part.count * part.centre).cpu()
    return ranks.broadcast({"mean": ranks.sum(mine) / total})[0]["mean"]
