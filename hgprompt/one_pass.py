"""Pass: the images through the network, once: statistics of their features, and gradients of the task loss by fold."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.checkpoint import PassCheckpoint
from hgprompt.distributed import Ranks, slices
from hgprompt.encoder import Impl, MicroBatch, encode, pull_back
from hgprompt.errors import DataError
from hgprompt.inputs import images_in, num_batches, read, same_batches
from hgprompt.kernels.compiler import copied
from hgprompt.moments import mixed
from hgprompt.objective import h_score
from hgprompt.progress import Reporter
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics
from hgprompt.stopping import StopRule
from hgprompt.task_loss import FittedHead, fit_heads, held_out_logits, inverse_temperatures, surest_temperatures
from hgprompt.workers import of_the_loader

READING = "reading the images"


class Pass:
    """One pass over the images: statistics of the features, and gradients of the task loss by fold.

    Args:
        sample: of the images, for the gradients of closed-form heads. rule: when to stop; None: at the end.
        loss: of the caller's head, with which each batch goes forward and backward at once; None: a closed-form head.
        shards: how many loaders of this length will be merged here; 0 where its length says nothing.
        by_prompts: every rank reads all images and has a share of the prompts; else, all prompts and a share of images.
    """

    def __init__(
        self,
        vit: FrozenViT,
        prompts: Tensor,
        statistics: EnsembleStatistics,
        sample: ImageSample,
        *,
        rule: StopRule | None,
        loss: Callable[[Tensor, Tensor, slice], Tensor] | None,
        ranks: Ranks,
        by_prompts: bool,
        shards: int,
        micro_batch: int | None,
        impl: Impl,
    ) -> None:
        self.ranks, self.by_prompts = ranks, by_prompts
        share = slices(len(prompts), ranks.world)[ranks.rank] if by_prompts else slice(0, len(prompts))
        self.first_prompt = share.start
        # On the device once, and not with every batch.
        self.vit, self.prompts = vit, prompts[share].to(vit.device, vit.dtype)
        self.options: dict[str, Any] = {"micro_batch": MicroBatch(micro_batch), "impl": impl}
        self.statistics, self.folds, self.shards = statistics, statistics.folds, shards
        self.sample, self.rule, self._loss = sample, rule, loss
        self.gradients: Tensor | None = None  # of this rank [folds, M, p, d], summed over the images of each fold
        self.num_gradient_images = 0
        self._shared = False  # some rank has had gradients
        self._whole = True  # all parts are of the same batches

    @property
    def has_gradients(self) -> bool:
        """Whether any rank has gradients, of this run or of the one that it goes on from."""
        return self._shared or self.num_gradient_images > 0

    @property
    def nbytes(self) -> int:
        """Bytes kept: statistics, sample and gradients."""
        gradients = 0 if self.gradients is None else self.gradients.numel() * self.gradients.element_size()
        return self.statistics.nbytes + self.sample.nbytes + gradients

    def stream(
        self, loader: Iterable[Any], report: Reporter, checkpoint: PassCheckpoint | None = None
    ) -> Generator[Tensor, None, None]:
        """Read the loader once, and yield the labels of each batch when it is done. With a checkpoint, batches that it
        knows are passed over, and what is done is kept when it is time, when the stream ends, and when it breaks off;
        not when the work between two batches does."""
        try:
            yield from self._stream(loader, report, checkpoint)
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = of_the_loader(error)
            kept = "" if checkpoint is None else checkpoint.rescue(self, whole=self._whole)
            if type(failure) is DataError and (kept or failure is not error):
                raise DataError(f"{failure}{kept}") from (error.__cause__ if failure is error else error)
            raise

    def _stream(self, loader: Iterable[Any], report: Reporter, checkpoint: PassCheckpoint | None) -> Iterator[Tensor]:
        # With collectives between them, the parts of a batch are done by all ranks or by none.
        step: Callable[[str], Any] = self.ranks.together if self.by_prompts else contextlib.nullcontext
        with step(READING):
            total = num_batches(loader)
            report("images", 0, total)
        note = None if checkpoint is None else checkpoint.note
        with contextlib.closing(read(loader, self.vit, note)) as own:
            batches: Iterator[tuple[Tensor, Tensor]] = own
            if self.by_prompts:
                batches = same_batches(own, self.ranks, READING)
            for done, (images, labels) in enumerate(batches, start=1):
                if done == 1 and total is not None:
                    self.statistics.expect(images_in(loader, total, len(labels)) * self.shards)
                if checkpoint is not None and checkpoint.skip(images, labels, self):
                    report("images", done, total)
                    continue
                with step(READING):
                    if self._loss is None:
                        features = self._encode(images)
                        self._whole = False
                    else:
                        self._whole = False
                        features = self._forward_backward(images, labels, self._loss)
                if self.by_prompts:
                    features = torch.cat(self.ranks.gather(features))
                with step(READING):
                    self.statistics.update(features, labels)
                    self.sample.update(images, labels, features)
                    if checkpoint is not None:
                        checkpoint.done()
                    report("images", done, total)
                self._whole = True
                yield labels
                if checkpoint is not None and checkpoint.due(self):
                    checkpoint.write(self)
        if checkpoint is not None:
            checkpoint.end_of_stream(self)

    def pull_back_sample(self, head: FittedHead, statistics: EnsembleStatistics, report: Reporter) -> None:
        """Gradients of closed-form heads, each fitted without the fold that it scores, at the held-out temperature."""
        stage = "taking the gradients"
        self.gradients, self.num_gradient_images = None, 0
        if not self.by_prompts:
            self.sample.share(self.ranks)
        with self.ranks.together(stage):
            parts = [self.sample.fold(k) for k in range(self.folds)]
            heads = fit_heads(head, statistics, device=self.vit.device)
            logits, targets = held_out_logits(heads, [f for _, _, f in parts], [y for _, y, _ in parts])
        if not self.by_prompts:
            logits, targets = torch.cat(self.ranks.gather(logits, 1), 1), torch.cat(self.ranks.gather(targets))
        with self.ranks.together(stage):
            report("gradients", 0, self.folds)
            factors = torch.minimum(inverse_temperatures(logits, targets), surest_temperatures(logits, targets))
            heads = [one.sharpened(factors) for one in heads]
            for k, (images, labels, _) in enumerate(parts):
                if len(images):
                    self._add_gradients(k, images, labels, heads[k].loss)
                report("gradients", k + 1, self.folds)

    def mixing_gap(self, weights: Tensor, prompt: Tensor, intensity: float) -> tuple[float, float]:
        """H of the mixed features and of the mixed `prompt`'s features, both on the gradient sample."""
        if not self.by_prompts:
            self.sample.share(self.ranks)  # of all images read, also where gradients were taken of fewer
        with self.ranks.together("judging the mixed prompt"):
            images, labels, features = self.sample.all()
            blend = under_mixture = torch.zeros(0, self.vit.width, dtype=torch.float64, device="cpu")
            if len(images):
                blend = mixed(features, weights)
                with torch.no_grad():
                    under_mixture = encode(self.vit, prompt[None], images, **self.options)[0].double()
        if not self.by_prompts:
            labels, blend, under_mixture = (torch.cat(self.ranks.gather(t)) for t in (labels, blend, under_mixture))
        if len(labels.unique()) < 2:
            return math.nan, math.nan
        try:
            a, b = (float(h_score(f, labels, shrinkage=intensity)) for f in (blend, under_mixture))
        except DataError:  # few images, which happen to have the same features
            return math.nan, math.nan
        return a, b

    def statistics_of_all(self, last: bool) -> EnsembleStatistics:
        """Statistics of all ranks' images; before the last time, as a copy."""
        if self.ranks.alone or self.by_prompts:
            return self.statistics
        if not any(self.ranks.gather_json(self.statistics.num_images)):
            raise DataError("the loaders of all ranks gave no images")
        if not last:
            return self.statistics.reduced(self.ranks)
        self.statistics.all_reduce(self.ranks)
        return self.statistics

    def gradients_of_all(self, last: bool) -> tuple[Tensor | None, int]:
        """Gradients [folds, M, ...] over all ranks, and of how many images; before the last time, as a copy."""
        self.ranks.stage = "adding up the gradients"
        gradients, count = self.gradients, self.num_gradient_images
        if not self.ranks.alone:
            if not self.by_prompts:
                count = int(self.ranks.sum(torch.tensor(count, device="cpu")))
            if count:
                if gradients is None:
                    gradients = self._no_gradients()
                if self.by_prompts:
                    gradients = torch.cat(self.ranks.gather(gradients, 1), 1)
                else:
                    gradients = self.ranks.sum(gradients if last else gradients.clone())
        self._shared = count > 0
        return gradients if count else None, count

    def _encode(self, images: Tensor) -> Tensor:
        """Features [m, B, h] under this rank's prompts."""
        if not len(self.prompts):
            return torch.zeros(0, len(images), self.vit.width, dtype=self.vit.dtype, device=self.vit.device)
        with torch.no_grad():
            return encode(self.vit, self.prompts, images, **self.options)

    def _forward_backward(
        self, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor, slice], Tensor]
    ) -> Tensor:
        fold_of = self.statistics.next_folds(len(images))
        features: Tensor | None = None
        for k in fold_of.unique().tolist():
            chosen = torch.nonzero(fold_of == k).flatten()
            part = self._add_gradients(k, images[copied(chosen, images.device)], labels[chosen], loss)
            if features is None:
                features = part.new_empty(len(part), len(images), part.shape[2])
            features[:, copied(chosen, part.device)] = part
        assert features is not None
        return features

    def _add_gradients(
        self, fold: int, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor, slice], Tensor]
    ) -> Tensor:
        if self.gradients is None:
            self.gradients = self._no_gradients()
        self.num_gradient_images += len(images)
        if not len(self.prompts):
            return self._encode(images)
        first = self.first_prompt
        features, _, gradients = pull_back(
            self.vit, self.prompts, images,
            lambda f, m, b: loss(f, labels[b], slice(first + m.start, first + m.stop)), **self.options,
        )  # fmt: skip
        self.gradients[fold] += gradients
        return features

    def _no_gradients(self) -> Tensor:
        precise = torch.promote_types(self.vit.dtype, torch.float32)
        return torch.zeros(self.folds, *self.prompts.shape, dtype=precise, device=self.vit.device)
