"""fast_ensemble: one pass over labelled images → how much of each prompt to take.

The road: images and prompts go through the network once; features become statistics; the gradients of a task loss in
the prompts become a Gram matrix; everything after the stream is small, exact linear algebra in α.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hgprompt import operations
from hgprompt.arguments import real
from hgprompt.backbone import FrozenViT
from hgprompt.checkpoint import PassCheckpoint, identity_of
from hgprompt.distributed import Ranks
from hgprompt.encoder import Impl
from hgprompt.errors import DataError, OptionError, warn
from hgprompt.inputs import Prompts, digest, gpu_of, num_batches, resolve
from hgprompt.kernels.gram import grams, grams_reference
from hgprompt.objective import Shrinkage
from hgprompt.one_pass import READING, Pass
from hgprompt.optimize import Solution, Solver, WeightProblem, jackknife_std
from hgprompt.options import Options
from hgprompt.progress import Progress, Reporter
from hgprompt.result import EnsembleResult
from hgprompt.sample import ImageSample
from hgprompt.statistics import EnsembleStatistics, Keep
from hgprompt.stopping import StopRule
from hgprompt.task_loss import Head, given_loss
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
    shard: Literal["images", "prompts"] = "images",
    head: Head = "shared-lda",
    gradient_images: int | None = 256,
    folds: int = 8,
    preset: Literal["paper"] | None = None,
    normalize: bool = True,
    solver: Solver = "quasi-newton",
    starts: int = 8,
    tolerance: float | None = None,
    gap_tolerance: float = 1e-6,
    max_steps: int | None = None,
    learning_rate: float = 0.005,
    keep: Keep = "auto",
    max_bytes: int | None = None,
    micro_batch: int | None = None,
    impl: Impl = "auto",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 300.0,
    keep_problem: bool = False,
) -> EnsembleResult:
    """How much of each prompt to take for a new labelled task, in one pass over its images.

    Args:
        prompts: a PromptPool, {name: [p, d]}, a sequence of [p, d], or a tensor [M, p, d] (deep: [L, p, d] each).
        loader: an iterable of (images [B, 3, H, W], integer labels [B]), read once. Images are normalised floats or
            uint8. Any order will do, also sorted by class (it decides only to which fold an image goes); the last batch
            may be short.
        backbone: a timm VisionTransformer, a FrozenViT, "mini" or a timm model name; None: the one that the pool names.
        lam: λ ≥ 0 of Eq. 12, the pull of gradient alignment.
        shrinkage: of the covariance in the H-score: "auto", "ledoit-wolf", "oas", an intensity in [0, 1), or 0.0 for
            Eq. 5 to the letter.
        device, dtype: of the computation; None: the backbone's own (for a name: a GPU if there is one, float32).
        seed: of the gradient sample and the solver's starts. Same input, seed and device: the same bits; on a GPU with
            the same micro_batch, which follows its free memory, in powers of two, where none is given, and in 16 bits
            with impl="triton" (PyTorch's own attention adds up gradients in any order there, unless it is told to be
            deterministic).
        progress: True for a bar on stderr, or a callable (stage, done, total or None).
        process_group: a torch.distributed group (gloo or NCCL) that shares the work: every rank of it calls this with
            the same prompts, backbone and options, and returns the same bits (docs/scaling.md). None: this process
            alone.
        shard: what the ranks share: "images": each reads images of its own, possibly none, and statistics and
            gradients are added up; or, for large pools, "prompts": each reads all images, in the same batches, and has
            a share of the prompts in the network.
        head: whose loss is pulled back to the prompts (Eq. 8): "shared-lda", "lda", "centroid" (closed form, fitted
            and cross-fitted after the pass, see `hgprompt.task_loss`), or your own: a module or function features
            [b, h], in the backbone's dtype, → logits [b, C], or one per prompt. Your own is applied during the pass, to
            every image; a module with dropout or batch norm must be in eval mode.
        gradient_images: with a closed-form head, gradients come from a uniform random sample of this many images,
            which is kept while the stream goes by; None: all images are kept, and their features a second time, which
            no max_bytes counts. 0 (with lam=0): no gradients. Ranks share the sample.
        folds: groups of images for cross-fitting and for the jackknife errors of the weights.
        preset: "paper" is Algorithm 1 to the letter: Eq. 5 unshrunk, H not divided by C-1, projected gradient from
            uniform with a fixed step, gradients of all images. These override what is given for them; learning_rate and
            max_steps stay yours, since the paper has none.
        normalize, solver, starts, learning_rate: as for `optimize_weights`.
        max_steps: as for `optimize_weights`; None: 200, and 1000 in the paper's preset.
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
            At the end of the stream there is one in any case.
        keep_problem: the result's `problem` answers more about the same pass (other λ, ablations, pools without a
            prompt) without reading anything again; what the pass kept stays in memory as long.

    Returns:
        The weights, the mixed prompt, and why: see EnsembleResult.

    Raises:
        PromptError: prompts that do not fit together or the backbone, or that make features constant. DataError:
        images or labels that cannot be used, or a loader that failed (with its own exception as the cause).
        BackboneError, OptionError: a backbone or an argument that cannot be used. StatisticsError: no room for the
        statistics, with what they would take. DeviceMemoryError: no room on a GPU for one image under one prompt.
        DistributedError: ranks that were called differently, or another rank that failed, died or did not come within
        the group's timeout. FileFormatError, OptionError, DataError: a checkpoint that is damaged, or of another pass
        or other data. OutputError: a checkpoint_dir that cannot be written to; without one nothing is written anywhere.
    """
    ranks = Ranks(process_group, gpu_of(device, backbone))
    # What is made inside inference mode passes no gradient, so a caller's inference mode is suspended.
    with torch.inference_mode(False), Progress.of(progress) as report:
        with ranks.together("checking the arguments"):
            options = Options(
                lam=lam, shrinkage=shrinkage, seed=seed, shard=shard, head=head, gradient_images=gradient_images,
                folds=folds, preset=preset, normalize=normalize, solver=solver, starts=starts, tolerance=tolerance,
                gap_tolerance=gap_tolerance, max_steps=max_steps, learning_rate=learning_rate, keep=keep,
                max_bytes=max_bytes, micro_batch=micro_batch, impl=impl,
            )  # fmt: skip
            checkpoint_every = real("checkpoint_every", checkpoint_every)
            pool, stack, vit = resolve(prompts, backbone, device, dtype)
            operations.select(vit, impl)
            one_pass = _pass_over(vit, stack, options, ranks)
            if checkpoint_dir is not None and not ranks.alone and (one_pass.rule is not None or shard == "prompts"):
                raise OptionError(
                    "checkpoint_dir over a process_group takes shard='images' and no tolerance: else ranks go batch by "
                    "batch, and each would resume at another"
                )
        settings = options.deciding | {"dtype": str(vit.dtype).removeprefix("torch.")}
        if not ranks.alone:
            network = f"{vit.name} {vit.image_size} {vit.fingerprint}"
            more = {"lam": options.lam, "shard": shard, "keep": keep}
            more |= {"checkpoint_dir": checkpoint_dir is not None}  # each may name a folder of its own
            ranks.agree({"prompts": digest(pool), "backbone": network} | more | settings)
        checkpoint = None
        with ranks.together("opening the checkpoints"):
            if checkpoint_dir is not None:
                counts = options.gathering | {"batches of the loader": num_batches(loader)}
                checkpoint = PassCheckpoint(
                    checkpoint_dir, identity_of(pool.names, stack, vit, head, counts), every=checkpoint_every,
                    rank=ranks.rank, num_ranks=ranks.world,
                )  # fmt: skip

        answer = functools.partial(_answer, one_pass, options, pool.names, report)
        found, stopped = _read(one_pass, loader, options, answer, report, checkpoint)
        if not stopped:
            found = answer(pull_back=True)
        weights = ranks.broadcast(None if found is None else {"weights": found.solution.weights})[0]["weights"]
        mixed = torch.tensordot(weights, stack.to("cpu", torch.float64), dims=1).to(stack.dtype)
        intensity = ranks.decided(None if found is None else found.solution.diagnostics.intensity)
        sample_h_scores = one_pass.mixing_gap(weights, mixed, intensity)
        with ranks.together("making the result"):
            result = None
            if found is not None:
                result = _result(
                    found, names=pool.names, mixed=mixed, lam=options.lam, settings=settings, vit=vit,
                    sample_h_scores=sample_h_scores, reached=one_pass.rule.error if one_pass.rule and stopped else None,
                    kept_bytes=one_pass.nbytes, keep_problem=keep_problem,
                )  # fmt: skip
            parts: tuple[Any, ...] = (None,) if result is None else result.to_parts()
        ranks.stage = "handing out the result"
        if not ranks.alone:
            received = ranks.broadcast(*parts)
            result = EnsembleResult.from_parts(*received) if result is None else result
    assert result is not None
    if checkpoint is not None:
        checkpoint.remove()
    return result


def _pass_over(vit: FrozenViT, stack: Tensor, options: Options, ranks: Ranks) -> Pass:
    """A pass that has not begun yet."""
    by_prompts = options.shard == "prompts" and not ranks.alone
    place = (0, 1) if by_prompts else (ranks.rank, ranks.world)
    rule = None if options.tolerance is None else StopRule(options.tolerance, options.folds)
    return Pass(
        vit,
        stack,
        EnsembleStatistics(folds=options.folds, keep=options.keep, max_bytes=options.max_bytes, shard=place),
        ImageSample(options.gradient_images if options.fitted else 0, options.folds, options.seed, shard=place),
        rule=rule,
        loss=None if options.fitted else given_loss(options.head, len(stack)),
        ranks=ranks,
        by_prompts=by_prompts,
        # A stream that may stop early is not refused for the images that it would not read.
        shards=0 if rule is not None else place[1],
        micro_batch=options.micro_batch,
        impl=options.impl,
    )


class _Answer(NamedTuple):
    """What is known after some images: α, α without each fold [folds, M], the Gram matrix of the gradients."""

    problem: WeightProblem
    solution: Solution
    without_fold: Tensor
    gram: Tensor | None
    num_gradient_images: int


def _answer(
    one_pass: Pass, options: Options, names: Sequence[str], report: Reporter, *, pull_back: bool, last: bool = True
) -> _Answer | None:
    """α of all images so far, on the first rank; None: there is nothing to solve yet, or this is another rank.

    Args:
        pull_back: take the gradients of a closed-form head anew, or leave them as they are.
        last: there will be no other answer.
    """
    of_all = one_pass.statistics_of_all(last)
    if reason := _why_no_problem(of_all):
        if last:
            raise DataError(reason)
        return None
    # A caller's autocast region is none of the heads' business.
    with torch.autocast(one_pass.vit.device.type, enabled=False):
        if isinstance(options.head, str) and options.gradient_images != 0 and pull_back:
            one_pass.pull_back_sample(options.head, of_all, report)
        gradients, count = one_pass.gradients_of_all(last)
        with one_pass.ranks.together("solving for the weights"):
            if last:
                report("weights", 0, None)
            if not one_pass.ranks.first:
                return None
            gram, fold_grams = _grams(gradients, names)
            problem = WeightProblem(of_all, gram, **options.solving)
            solution = problem.solve(options.lam)
            without_fold = problem.jackknife(solution, fold_grams, options.lam)
            return _Answer(problem, solution, without_fold, gram, count)


def _read(
    one_pass: Pass,
    loader: Iterable[Any],
    options: Options,
    answer: Callable[..., _Answer | None],
    report: Reporter,
    checkpoint: PassCheckpoint | None,
) -> tuple[_Answer | None, bool]:
    """Read the loader to its end, or until α is known well enough: α then, and whether it is."""
    rule, ranks = one_pass.rule, one_pass.ranks
    with contextlib.closing(one_pass.stream(loader, report, checkpoint)) as stream:  # the loader's workers end with it
        if rule is None:
            with ranks.together(READING):
                for _ in stream:
                    pass
            return None, False

        def is_known(found: _Answer | None) -> bool:
            enough = found is not None and rule.look(found.solution.weights, found.without_fold)
            return bool(ranks.decided(enough))

        for labels in stream if one_pass.by_prompts else ranks.rounds(stream, READING):
            if not rule.due(labels):
                continue
            found = answer(pull_back=not one_pass.has_gradients, last=False)
            known = is_known(found)
            if known and options.fitted and options.lam > 0:
                # The sample has grown since its gradients were taken: with new ones the answer must hold too.
                found = answer(pull_back=True, last=False)
                known = is_known(found)
            if known:
                return found, True
    return None, False


def _result(
    found: _Answer,
    *,
    names: Sequence[str],
    mixed: Tensor,
    lam: float,
    settings: dict[str, Any],
    vit: FrozenViT,
    sample_h_scores: tuple[float, float],
    reached: float | None,
    kept_bytes: int,
    keep_problem: bool,
) -> EnsembleResult:
    """The first rank's result. reached: the bound on the error that ended the stream; None: it came to its end."""
    problem, (weights, diagnostics), without_fold, gram, num_gradient_images = found
    covariance = problem.source_covariance
    nan = torch.full((len(names), len(names)), math.nan, dtype=torch.float64, device="cpu")
    return EnsembleResult(
        weights=weights,
        names=tuple(names),
        prompt=mixed,
        h_score=diagnostics.h_score,
        alignment_loss=diagnostics.alignment_loss,
        objective=diagnostics.objective,
        gap=diagnostics.gap,
        converged=diagnostics.converged,
        h_score_std=problem.h_score_std(weights),
        source_h_scores=diagnostics.source_h_scores,
        source_h_score_std=covariance.diagonal().sqrt(),
        source_rank_std=rank_std(diagnostics.source_h_scores, covariance),
        uniform_h_score=diagnostics.uniform_h_score,
        gradient_cosines=nan if gram is None else gram,
        weight_std=jackknife_std(without_fold),
        weight_error=weight_error(without_fold) if reached is None else reached,
        stop_reason="end of data" if reached is None else "tolerance reached",
        n_images=problem.statistics.num_images,
        n_classes=len(problem.statistics.classes),
        n_gradient_images=num_gradient_images,
        sample_h_score=sample_h_scores[0],
        sample_h_score_mixed_prompt=sample_h_scores[1],
        shrinkage_intensity=diagnostics.intensity,
        kept_bytes=kept_bytes,
        classes=problem.statistics.classes,
        lam=lam,
        settings=settings,
        backbone=vit.info,
        problem=problem if keep_problem else None,
    )


def _why_no_problem(statistics: EnsembleStatistics) -> str | None:
    """Why there is nothing to solve (yet); None where there is."""
    images, classes = statistics.num_images, statistics.classes
    if images == 0:
        return "the loader gave no images"
    if len(classes) < 2:
        return f"all {images} images are of class {classes[0]}: weighing prompts needs at least two classes"
    if images <= len(classes):
        return f"{images} images of as many classes say nothing of the spread within a class: give several of each"
    return None


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
        warn(f"prompts {dead} have a zero gradient: no direction, left out of the alignment")
    return gram, list(without_fold)
