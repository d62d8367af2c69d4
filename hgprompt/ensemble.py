"""fast_ensemble: one pass over labelled images → how much of each prompt to take.

The road: images and prompts go through the network once; features become statistics; the gradients of a task loss in
the prompts become a Gram matrix; everything after the stream is small, exact linear algebra in α.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hgprompt import operations
from hgprompt.backbone import FrozenViT
from hgprompt.checkpoint import PassCheckpoint, identity_of
from hgprompt.encoder import Impl, MicroBatch, encode, pull_back
from hgprompt.errors import DataError, HGPromptWarning, OptionError
from hgprompt.inputs import Prompts, num_batches, of_the_loader, read, resolve
from hgprompt.kernels.gram import grams, grams_reference
from hgprompt.objective import Shrinkage, h_score
from hgprompt.optimize import Solution, Solver, WeightProblem, check_options, jackknife_std
from hgprompt.progress import Progress, Reporter
from hgprompt.result import EnsembleResult
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics, Keep
from hgprompt.stopping import StopRule
from hgprompt.task_loss import FITTED, FittedHead, Head, fit_heads, given_loss, held_out_logits, inverse_temperatures
from hgprompt.uncertainty import rank_std, weight_error

logger = logging.getLogger(__name__)


def fast_ensemble(
    prompts: Prompts,
    loader: Iterable[Any],
    *,
    backbone: nn.Module | str | None = None,
    lam: float = 1.0,
    shrinkage: Shrinkage = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    progress: bool | Reporter = False,
    process_group: Any = None,
    head: Head = "shared-lda",
    gradient_images: int | None = 256,
    folds: int = 8,
    preset: Literal["paper"] | None = None,
    normalize: bool = True,
    solver: Solver = "quasi-newton",
    starts: int = 8,
    tolerance: float | None = None,
    gap_tolerance: float = 1e-6,
    max_steps: int = 200,
    learning_rate: float = 0.005,
    keep: Keep = "auto",
    max_bytes: int | None = None,
    micro_batch: int | None = None,
    impl: Impl = "auto",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 300.0,
) -> EnsembleResult:
    """How much of each prompt to take for a new labelled task, in one pass over its images.

    Args:
        prompts: a PromptPool, {name: [p, d]}, a sequence of [p, d], or a tensor [M, p, d] (deep: [L, p, d] each).
        loader: an iterable of (images [B, 3, H, W], integer labels [B]), read once. Images are normalised floats or
            uint8. Any order will do, also sorted by class; the last batch may be short.
        backbone: a timm VisionTransformer, a FrozenViT, "mini" or a timm model name; None: the one that the pool names.
        lam: λ ≥ 0 of Eq. 12, the pull of gradient alignment.
        shrinkage: of the covariance in the H-score: "auto", "ledoit-wolf", "oas", an intensity in [0, 1), or 0.0 for
            Eq. 5 to the letter.
        device, dtype: of the computation; None: the backbone's own (for a name: a GPU if there is one, float32).
        seed: of the gradient sample and the solver's starts. Same input, seed and device: the same bits.
        progress: True for a bar on stderr, or a callable (stage, done, total or None).
        process_group: a torch.distributed group over whose ranks the images are spread: statistics and gradients
            are reduced over it and every rank returns the same result. None: this process alone.
        head: whose loss is pulled back to the prompts (Eq. 8): "shared-lda", "lda", "centroid" (closed form, fitted
            and cross-fitted after the pass, see `hgprompt.task_loss`), or
            your own: a module or function features [b, h] → logits [b, C], or
            one per prompt. Your own is applied during the pass, to every image.
        gradient_images: with a closed-form head, gradients come from a uniform random sample of this many images,
            which is kept while the stream goes by; None: all images are kept. 0 (with lam=0): no gradients. Over a
            process group the number is per rank.
        folds: groups of images for cross-fitting and for the jackknife errors of the weights.
        preset: "paper" is Algorithm 1 to the letter: Eq. 5 unshrunk, H not divided by C-1, projected gradient from
            uniform with a fixed step (the paper gives none: 0.005, 1000 steps), gradients of all images.
        normalize, solver, starts, max_steps, learning_rate: as for `optimize_weights`.
        tolerance: stop reading as soon as a bound on ‖α - α_∞‖₁ falls to this (`hgprompt.stopping`; 0.1 is a useful
            start); the loader must be shuffled. None: read all images.
        gap_tolerance: Frank–Wolfe gap at which the solver stops.
        keep: what is kept of the features: "features", "moments", or "auto": whichever is smaller; `hgprompt.footprint`
            says beforehand what either takes.
        max_bytes: memory for it; None: what the device has free, less a fifth. Where the loader has a length,
            statistics that would not fit are refused with the first batch.
        micro_batch: image–prompt pairs in the network at one time; memory grows with it, not with M or N. Halved for
            the rest of the pass where a GPU's memory runs out.
        impl: engine of the network, as for `encode`.
        checkpoint_dir: a folder for this pass alone, in which what was done is kept (docs/long-runs.md). The same call
            after an interruption goes on from there, to the same bits; it reads the loader from the start again, which
            must give the same batches. The file is gone when there is a result. Every rank keeps its own.
        checkpoint_every: seconds between two checkpoints, at least; more where they would take over 5 % of the time.

    Returns:
        The weights, the mixed prompt, and why: see EnsembleResult.

    Raises:
        PromptError: prompts that do not fit together or the backbone, or that make features constant. DataError:
        images or labels that cannot be used, or a loader that failed (with its own exception as the cause).
        BackboneError, OptionError: a backbone or an argument that cannot be used. FileFormatError, OptionError,
        DataError: a checkpoint that is damaged, or of another pass or other data. Without checkpoint_dir nothing is
        written anywhere.
    """
    if preset == "paper":
        shrinkage, normalize, starts, gradient_images = 0.0, False, 1, None
        solver, max_steps, learning_rate = "projected-gradient", 1000, 0.005
    elif preset is not None:
        raise OptionError(f"preset must be None or 'paper', got {preset!r}")
    check_options(lam=lam, shrinkage=shrinkage, solver=solver, starts=starts)
    _check_options(lam, gradient_images, folds, head)
    if tolerance is not None and process_group is not None:
        raise OptionError("tolerance cannot be combined with process_group: ranks would have to stop together")
    rule = None if tolerance is None else StopRule(tolerance, folds)
    fitted = isinstance(head, str)
    # What is made inside inference mode passes no gradient, so a caller's inference mode is suspended.
    with torch.inference_mode(False), Progress.of(progress) as report:
        pool, stack, vit = resolve(prompts, backbone, device, dtype)
        names = pool.names
        operations.select(vit, impl)
        # A stream that may stop early is not refused for the images that it would not read.
        shards = 0 if rule is not None else _num_ranks(process_group)
        statistics = EnsembleStatistics(folds=folds, keep=keep, max_bytes=max_bytes)
        gather = _Pass(vit, stack, names, statistics, shards=shards, micro_batch=micro_batch, impl=impl)
        sample = ImageSample(gradient_images if fitted else 0, folds, seed)
        checkpoint: PassCheckpoint | None = None
        if checkpoint_dir is not None:
            counts: dict[str, Any] = {
                "folds": folds, "keep": keep, "gradient_images": gradient_images, "seed": seed, "impl": impl,
                "micro_batch": micro_batch, "tolerance": tolerance, "batches of the loader": num_batches(loader),
            }  # fmt: skip
            if rule is not None:  # where the stream ends hangs on the weights
                counts |= {
                    "lam": lam, "shrinkage": shrinkage, "normalize": normalize, "solver": solver, "starts": starts,
                    "gap_tolerance": gap_tolerance, "max_steps": max_steps, "learning_rate": learning_rate,
                }  # fmt: skip
            checkpoint = PassCheckpoint(
                checkpoint_dir, identity_of(names, stack, vit, head, counts), every=checkpoint_every,
                rank=_rank(process_group), num_ranks=_num_ranks(process_group),
            )  # fmt: skip

        def answer(*, pull_back: bool) -> _Answer:
            """α of all images so far. Gradients of a closed-form head are pulled back anew, or stay as they are."""
            if fitted and gradient_images != 0 and pull_back:
                gather.pull_back_sample(head, sample, report, process_group)  # type: ignore[arg-type]
            total, fold_grams = _grams(gather.reduce_gradients(process_group), names)
            problem = WeightProblem(
                gather.statistics, total, shrinkage=shrinkage, normalize=normalize, starts=starts,
                tolerance=gap_tolerance, max_steps=max_steps, seed=seed,
            )  # fmt: skip
            solution = problem.solve(lam, solver=solver, learning_rate=learning_rate)
            without_fold = problem.jackknife(solution, fold_grams, lam, solver=solver, learning_rate=learning_rate)
            return _Answer(problem, solution, without_fold, total)

        stopped: _Answer | None = None
        loss = None if fitted else given_loss(head, len(stack))
        for labels in gather.stream(loader, report, sample=sample, loss=loss, rule=rule, checkpoint=checkpoint):
            if rule is None or not rule.due(labels) or not _is_problem(gather.statistics):
                continue
            now = answer(pull_back=gather.num_gradient_images == 0)
            known = rule.look(now.solution.weights, now.without_fold)
            if known and fitted and lam > 0:
                # The sample has grown since its gradients were taken: with new ones the answer must hold too.
                now = answer(pull_back=True)
                known = rule.look(now.solution.weights, now.without_fold)
            if known:
                stopped = now
                break
        gather.reduce_statistics(process_group)
        _check_problem(gather.statistics)
        report("weights", 0, None)
        problem, solution, without_fold, total = stopped or answer(pull_back=True)
        weights, found = solution
        mixed = torch.tensordot(weights, stack.to("cpu", torch.float64), dims=1).to(stack.dtype)
        sample_h, sample_h_mixed = math.nan, math.nan
        if process_group is None:  # each rank has a sample of its own, and all must return the same
            sample_h, sample_h_mixed = _mixing_gap(gather, sample, weights, mixed, found.intensity)
        if checkpoint is not None:
            checkpoint.remove()

    covariance = problem.source_covariance
    nan = torch.full((len(names), len(names)), math.nan, dtype=torch.float64)
    return EnsembleResult(
        weights=weights,
        names=names,
        prompt=mixed,
        h_score=found.h_score,
        alignment_loss=found.alignment_loss,
        objective=found.objective,
        gap=found.gap,
        converged=found.converged,
        h_score_std=problem.h_score_std(weights),
        source_h_scores=found.source_h_scores,
        source_h_score_std=covariance.diagonal().sqrt(),
        source_rank_std=rank_std(found.source_h_scores, covariance),
        uniform_h_score=found.uniform_h_score,
        gradient_cosines=nan if total is None else total,
        weight_std=jackknife_std(without_fold),
        weight_error=weight_error(without_fold) if rule is None or stopped is None else rule.error,
        stop_reason="end of data" if stopped is None else "tolerance reached",
        n_images=gather.statistics.num_images,
        n_classes=len(gather.statistics.classes),
        n_gradient_images=gather.num_gradient_images,
        sample_h_score=sample_h,
        sample_h_score_mixed_prompt=sample_h_mixed,
        shrinkage_intensity=found.intensity,
        kept_bytes=gather.statistics.nbytes + sample.nbytes + gather.gradient_bytes,
        classes=gather.statistics.classes,
        lam=float(lam),
        settings={
            "shrinkage": shrinkage, "normalize": normalize, "solver": solver, "starts": starts, "tolerance": tolerance,
            "gap_tolerance": gap_tolerance, "seed": seed, "folds": folds, "gradient_images": gradient_images,
            "preset": preset, "head": head if isinstance(head, str) else "given",
            "dtype": str(vit.dtype).removeprefix("torch."),
        },
        backbone=vit.info,
    )  # fmt: skip


class _Answer(NamedTuple):
    """What is known after some images: α, α without each fold [folds, M], the Gram matrix of the gradients."""

    problem: WeightProblem
    solution: Solution
    without_fold: Tensor
    gram: Tensor | None


class _Pass:
    """One pass over the images: statistics of the features, and gradients of the task loss by fold.

    Args:
        shards: how many loaders of this length will be merged here; 0 where its length says nothing.
    """

    def __init__(
        self,
        vit: FrozenViT,
        prompts: Tensor,
        names: Sequence[str],
        statistics: EnsembleStatistics,
        *,
        shards: int,
        micro_batch: int | None,
        impl: Impl,
    ) -> None:
        # On the device once, and not with every batch.
        self.vit, self.prompts, self.names = vit, prompts.to(vit.device, vit.dtype), names
        self.options: dict[str, Any] = {"micro_batch": MicroBatch(micro_batch), "impl": impl}
        self.statistics, self.folds, self.shards = statistics, statistics.folds, shards
        self.gradients: Tensor | None = None  # [folds, M, p, d], summed over the images of each fold
        self.num_gradient_images = 0
        self.sample: ImageSample | None = None
        self.rule: StopRule | None = None
        self._whole = True  # all parts are of the same batches

    @property
    def gradient_bytes(self) -> int:
        return 0 if self.gradients is None else self.gradients.numel() * self.gradients.element_size()

    def stream(
        self,
        loader: Iterable[Any],
        report: Reporter,
        *,
        sample: ImageSample | None = None,
        loss: Callable[[Tensor, Tensor, slice], Tensor] | None = None,
        rule: StopRule | None = None,
        checkpoint: PassCheckpoint | None = None,
    ) -> Iterator[Tensor]:
        """Read the loader once, and yield the labels of each batch when it is done. With a loss, each batch goes
        forward and backward at once. With a checkpoint, batches that it knows are passed over, and what is done is kept
        when it is time, when the stream ends, and when it breaks off."""
        self.sample, self.rule = sample, rule
        try:
            yield from self._stream(loader, report, loss, checkpoint)
        except GeneratorExit:
            raise
        except BaseException as error:
            failure = of_the_loader(error)
            kept = "" if checkpoint is None else checkpoint.rescue(self, whole=self._whole)
            if type(failure) is DataError and (kept or failure is not error):
                raise DataError(f"{failure}{kept}") from (error.__cause__ if failure is error else error)
            raise

    def _stream(
        self,
        loader: Iterable[Any],
        report: Reporter,
        loss: Callable[[Tensor, Tensor, slice], Tensor] | None,
        checkpoint: PassCheckpoint | None,
    ) -> Iterator[Tensor]:
        total = num_batches(loader)
        report("images", 0, total)
        note = None if checkpoint is None else checkpoint.note
        with contextlib.closing(read(loader, self.vit, note)) as batches:
            for done, (images, labels) in enumerate(batches, start=1):
                if done == 1 and total is not None:
                    self.statistics.expect(total * len(labels) * self.shards)
                if checkpoint is not None and checkpoint.skip(images, labels, self):
                    report("images", done, total)
                    continue
                if loss is None:
                    with torch.no_grad():
                        features = encode(self.vit, self.prompts, images, **self.options)
                    self._whole = False
                else:
                    self._whole = False
                    features = self._forward_backward(images, labels, loss)
                self.statistics.update(features, labels)
                if self.sample is not None:
                    self.sample.update(images, labels, features)
                if checkpoint is not None:
                    checkpoint.done()
                self._whole = True
                report("images", done, total)
                yield labels
                if checkpoint is not None and checkpoint.due(self):
                    checkpoint.write(self)
        if checkpoint is not None:
            checkpoint.end_of_stream(self)

    def pull_back_sample(self, head: FittedHead, sample: ImageSample, report: Reporter, group: Any) -> None:
        """Gradients of closed-form heads, each fitted without the fold that it scores, at the held-out temperature."""
        self.gradients, self.num_gradient_images = None, 0
        parts = [sample.fold(k) for k in range(self.folds)]
        heads = fit_heads(head, self.statistics, device=self.vit.device)
        logits, targets = held_out_logits(heads, [f for _, _, f in parts], [y for _, y, _ in parts])
        logits, targets = _gather(logits, 1, group), _gather(targets, 0, group)
        heads = [one.sharpened(inverse_temperatures(logits, targets)) for one in heads]
        report("gradients", 0, self.folds)
        for k, (images, labels, _) in enumerate(parts):
            if len(images):
                self._add_gradients(k, images, labels, heads[k].loss)
            report("gradients", k + 1, self.folds)

    def _forward_backward(
        self, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor, slice], Tensor]
    ) -> Tensor:
        fold_of = torch.arange(self.statistics.num_images, self.statistics.num_images + len(images)) % self.folds
        features: Tensor | None = None
        for k in fold_of.unique().tolist():
            chosen = torch.nonzero(fold_of == k).flatten()
            part = self._add_gradients(k, images[chosen.to(images.device)], labels[chosen], loss)
            if features is None:
                features = part.new_empty(len(part), len(images), part.shape[2])
            features[:, chosen.to(part.device)] = part
        assert features is not None
        return features

    def _add_gradients(
        self, fold: int, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor, slice], Tensor]
    ) -> Tensor:
        features, _, gradients = pull_back(
            self.vit, self.prompts, images, lambda f, m, b: loss(f, labels[b], m), **self.options
        )
        if self.gradients is None:
            self.gradients = gradients.new_zeros(self.folds, *gradients.shape)
        self.gradients[fold] += gradients
        self.num_gradient_images += len(images)
        return features

    def reduce_statistics(self, group: Any) -> None:
        if group is not None:
            self.statistics.all_reduce(group)

    def reduce_gradients(self, group: Any) -> Tensor | None:
        """Gradients [folds, M, ...] over all ranks; every rank must take part, also one without images."""
        if group is not None:
            import torch.distributed as dist

            shape = (self.folds, *self.prompts.shape)
            precise = torch.promote_types(self.vit.dtype, torch.float32)
            if self.gradients is None:
                self.gradients = torch.zeros(shape, dtype=precise, device=self.vit.device)
            count = torch.tensor(self.num_gradient_images, device=self.vit.device)
            dist.all_reduce(self.gradients, group=group)
            dist.all_reduce(count, group=group)
            self.num_gradient_images = int(count)
        return self.gradients if self.num_gradient_images else None


def _check_options(lam: float, gradient_images: int | None, folds: int, head: Head) -> None:
    if folds < 1:
        raise OptionError(f"folds must be at least 1, got {folds}")
    if isinstance(head, str) and head not in FITTED:
        raise OptionError(f"head must be one of {', '.join(map(repr, FITTED))}, or your own; got {head!r}")
    if gradient_images is not None and gradient_images < 0:
        raise OptionError(f"gradient_images must be at least 0, got {gradient_images}")
    if gradient_images == 0 and lam > 0 and isinstance(head, str):
        raise OptionError("gradient_images=0 leaves nothing to align: set lam=0 as well, or let it have images")


def _check_problem(statistics: EnsembleStatistics) -> None:
    if statistics.num_images == 0:
        raise DataError("the loader gave no images")
    if len(statistics.classes) < 2:
        raise DataError(
            f"all {statistics.num_images} images are of class {statistics.classes[0]}: "
            "weighing prompts needs at least two classes"
        )
    if statistics.num_images <= len(statistics.classes):
        raise DataError(
            f"{statistics.num_images} images of as many classes say nothing of the spread within a class: "
            "give several images of each"
        )


def _is_problem(statistics: EnsembleStatistics) -> bool:
    """Whether there is anything to solve yet."""
    return 2 <= len(statistics.classes) < statistics.num_images


def _grams(gradients: Tensor | None, names: Sequence[str]) -> tuple[Tensor | None, list[Tensor] | None]:
    """Gram matrix of the whole gradients, and of those without each fold."""
    if gradients is None:
        return None, None
    whole = gradients.sum(0)
    if not bool(whole.isfinite().all()):
        bad = [n for n, g in zip(names, whole, strict=True) if not bool(g.isfinite().all())]
        raise DataError(
            f"gradients of prompts {bad} are not finite: look for overflow in the head or the compute dtype"
        )
    gram, without_fold = (found.cpu() for found in (grams if gradients.is_cuda else grams_reference)(gradients))
    dead = [n for n, k in zip(names, gram.diagonal().tolist(), strict=True) if k == 0]
    if dead:
        warnings.warn(
            f"prompts {dead} have a zero gradient: no direction, left out of the alignment",
            HGPromptWarning,
            stacklevel=3,
        )
    return gram, list(without_fold)


def _mixing_gap(
    gather: _Pass, sample: ImageSample, weights: Tensor, mixed: Tensor, intensity: float
) -> tuple[float, float]:
    """H of the mixed features and of the mixed prompt's features, both on the gradient sample."""
    images, labels, features = sample.all()
    if len(labels.unique()) < 2:
        return math.nan, math.nan
    blend = torch.tensordot(weights.to(features.device), features.double(), dims=1)
    with torch.no_grad():
        under_mixture = encode(gather.vit, mixed[None], images, **gather.options)[0]
    a, b = (float(h_score(f, labels, shrinkage=intensity)) for f in (blend, under_mixture))
    return a, b


def _num_ranks(group: Any) -> int:
    if group is None:
        return 1
    import torch.distributed as dist

    return dist.get_world_size(group)


def _rank(group: Any) -> int:
    if group is None:
        return 0
    import torch.distributed as dist

    return dist.get_rank(group)


def _gather(part: Tensor, dim: int, group: Any) -> Tensor:
    """The parts of all ranks, side by side; without a group, the part itself."""
    if group is None:
        return part
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part.cpu(), group=group)
    return torch.cat(parts, dim=dim)
