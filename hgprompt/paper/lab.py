"""Lab: what all cells of an output folder share: the backbone, the tasks, how things are tuned, the source prompts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hgprompt.backbone import FrozenViT
from hgprompt.data import LabelledImages
from hgprompt.errors import DataError, OptionError, PromptError
from hgprompt.paper.cells import Cell, Work
from hgprompt.paper.tasks import VTAB, LoadedTask, Suite, TaskFolder, canonical
from hgprompt.pool import PromptPool
from hgprompt.progress import Reporter
from hgprompt.tuning import TuneConfig, random_prompt, tune
from hgprompt.tuning.method import Setting
from hgprompt.tuning.methods.vpt import DEEP_DROPOUT
from hgprompt.tuning.protocol import GRIDS

RECIPE = 3
"""Version of the recipes: raised where the same options give other numbers, so that old cells are not mixed in."""
_SOURCE_LR = 0.16


@dataclass(frozen=True)
class Plan:
    """How the experiments are run; the defaults are the paper's, where it says.

    Attributes:
        tokens: p of a prompt. deep: a prompt for every block.
        epochs: of tuning on a target. source_epochs: of tuning a source prompt.
        seeds: of the repetitions. pool_seed: of the source prompts' one random start; none of theirs, so that no run's
            random prompt is the start of the sources.
        grid: which learning rates and weight decays compete on the validation images (`GRIDS`): "full" is VPT's.
        batch_size: images per step. lam: λ of Eq. 12.
        test_limit: at most this many test images, classes in turn; None: all.
    """

    tokens: int = 50
    deep: bool = False
    epochs: int = 100
    source_epochs: int = 10
    seeds: tuple[int, ...] = (42, 44, 82)
    pool_seed: int = 0
    grid: str = "full"
    batch_size: int = 64
    lam: float = 1.0
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise OptionError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise OptionError(f"seeds must be different numbers, at least one; got {list(self.seeds)}")
        if self.pool_seed in self.seeds:
            raise OptionError(f"seed {self.pool_seed} is that of the sources' common start: take others for the runs")
        for name in ("tokens", "epochs", "source_epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not all(0 <= seed < 2**63 for seed in (*self.seeds, self.pool_seed)):
            raise OptionError(f"seeds must be from 0 to 2^63 - 1, got {list(self.seeds)}")
        if self.test_limit is not None and self.test_limit < 1:
            raise OptionError(f"test_limit must be at least 1, got {self.test_limit}")


class Lab:
    """Makes cells that are fully identified, and gives them what they need when they run.

    Args:
        backbone: the frozen network. model: makes it as a timm model in float32.
        suite: targets, and where no pool is given the sources too.
        plan: how. out: the folder of all results.
        pool: source prompts; None: one is tuned on each of `sources`.
        sources: tasks to tune source prompts on, when no pool is given; None: all of the suite.

    Raises:
        PromptError: a pool that does not fit the backbone or the plan. DataError: a source that is not in the suite.
    """

    def __init__(
        self,
        backbone: FrozenViT,
        model: Callable[[], nn.Module],
        suite: Suite,
        plan: Plan,
        out: str | Path,
        *,
        pool: PromptPool | None = None,
        sources: Sequence[str] | None = None,
    ) -> None:
        self.backbone, self.model, self.suite, self.plan, self.out = backbone, model, suite, plan, Path(out)
        self._given, self._made, self._loaded = pool, None, None
        if pool is not None:
            pool.check_backbone(backbone.info)
            if (pool.num_tokens, pool.is_deep) != (plan.tokens, plan.deep):
                kind = "deep" if pool.is_deep else "shallow"
                raise PromptError(
                    f"the pool holds {kind} prompts of {pool.num_tokens} tokens: a comparison is of one kind, give "
                    f"--tokens {pool.num_tokens}" + (" --deep" if pool.is_deep else " without --deep")
                )
            began = [seed for seed in plan.seeds if any(pool.metadata[n].get("init_seed") == seed for n in pool)]
            if began:
                raise OptionError(
                    f"seed {began[0]} is that of the sources' common start, and a run's random prompt would be it: "
                    "take other --seeds"
                )
            # A prompt that is named otherwise may still be of one of the tasks: its record says so.
            self._tasks_of = {n: str(pool.metadata[n].get("task") or n) for n in pool}
        else:
            unknown = [n for n in sources or () if canonical(n) not in suite.tasks]
            if unknown:
                raise DataError(f"no source prompt can be tuned on {', '.join(unknown)}: not in {suite.root}")
            self._tasks_of = {n: n for n in dict.fromkeys(map(canonical, sources or suite.tasks))}

    _made: PromptPool | None
    _loaded: LoadedTask | None

    def task(self, name: str) -> TaskFolder:
        """A task by any of its names."""
        return self.suite.tasks[canonical(name)]

    def load(self, name: str, report: Reporter | None = None) -> LoadedTask:
        """Its images; the task that was loaded last stays in memory."""
        if self._loaded is None or self._loaded.folder.name != canonical(name):
            self._loaded = None  # two tasks at once may be too many
            self._loaded = self.task(name).load(
                self.backbone.image_size, self.backbone.interpolation, test_limit=self.plan.test_limit,
                report=None if report is None else lambda done, total: report("decoding", done, total),
            )  # fmt: skip
        return self._loaded

    # Identities

    def identity(self, task: str, **more: Any) -> dict[str, Any]:
        """What every result on a task depends on, and what this one depends on besides."""
        vit = self.backbone
        return {
            "recipe": RECIPE, "network": vit.name, "backbone": vit.fingerprint, "image_size": list(vit.image_size),
            "normalisation": [list(vit.mean), list(vit.std), vit.interpolation],
            "dtype": str(vit.dtype).removeprefix("torch."), "task": canonical(task), "data": self.task(task).digest,
            "tokens": self.plan.tokens, "deep": self.plan.deep, **more,
        }  # fmt: skip

    def pool_identity(self, names: Sequence[str]) -> str:
        """A digest of what these source prompts depend on, known before they are tuned."""
        if self._given is not None:
            began = [self._given.metadata[name].get("init_seed") for name in names]  # SPoT and PANDA start there
            return _digest({name: self._given[name] for name in names}, json.dumps(began))
        recipes = [[name, self._source_identity(name)] for name in names]
        return hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()

    # Source prompts

    def sources(self, *, without: str | None = None) -> tuple[str, ...]:
        """Names of the source prompts, but those tuned on one task.

        Raises:
            DataError: fewer than two are left.
        """
        names = tuple(n for n, task in self._tasks_of.items() if without is None or _task_of(task) != _task_of(without))
        if len(names) < 2:
            raise DataError(
                f"{len(names)} source prompts for {without or 'a mixture'}: a mixture takes at least two; have more "
                "tasks in the data root, or give --pool"
            )
        return names

    def source_cells(self) -> list[Cell]:
        """A cell for each source prompt that has to be tuned."""
        if self._given is not None:
            return []
        return [
            Cell(f"source.{name}", self._source_identity(name), lambda work, n=name: self._tune_source(n, work))  # type: ignore[misc]
            for name in self._tasks_of
        ]

    def pool(self, names: Sequence[str]) -> PromptPool:
        """These source prompts; all must be tuned by now."""
        return self.whole_pool().subset(names)

    def whole_pool(self) -> PromptPool:
        """All source prompts; where they were tuned here, also in `pool.safetensors`."""
        if self._given is not None:
            return self._given
        if self._made is None:
            parts = [PromptPool.load(self._source_file(name)) for name in self._tasks_of]
            made = parts[0]
            for part in parts[1:]:
                made = made.merge(part)
            self._made = made
            self._save(made)
        return self._made

    def _save(self, made: PromptPool) -> None:
        """The pool, and with it what other experiments in this folder have left in its file."""
        there = PromptPool.load(self.pool_file) if self.pool_file.exists() else None
        if there is not None and there.backbone == made.backbone and there.stack().shape[1:] == made.stack().shape[1:]:
            others = [name for name in there.names if name not in made.names]
            made = made.merge(there.subset(others)) if others else made
        made.save(self.pool_file)

    @property
    def pool_given(self) -> bool:
        """Whether the source prompts came from outside, and were not tuned here."""
        return self._given is not None

    @property
    def pool_file(self) -> Path:
        return self.out / "pool.safetensors"

    # Targets

    def setting(self, images: LabelledImages, sources: Sequence[str]) -> Setting:
        """What a method gets of a target: these training images and these source prompts; none where none are named."""
        return Setting(
            self.backbone, self.model, images, images.num_classes, self.plan.tokens, self.plan.deep,
            self.pool(sources) if sources else None,
        )  # fmt: skip

    def config(self) -> TuneConfig:
        """Of all tuning on targets; rates, decay and seed are the protocol's business. Dropout is VPT's."""
        plan = self.plan
        return TuneConfig(epochs=plan.epochs, batch_size=plan.batch_size, prompt_dropout=DEEP_DROPOUT * plan.deep)

    def _source_config(self) -> TuneConfig:
        return TuneConfig(
            epochs=self.plan.source_epochs, batch_size=32, optimizer="adamw", lr=_SOURCE_LR, head_lr=_SOURCE_LR / 4,
            seed=self.plan.pool_seed,
        )  # fmt: skip

    def _source_identity(self, name: str) -> dict[str, Any]:
        return self.identity(name, config=dataclasses.asdict(self._source_config()))

    def _source_file(self, name: str) -> Path:
        return self.out / "sources" / f"{name}.safetensors"

    def _tune_source(self, name: str, work: Work) -> dict[str, Any]:
        from hgprompt.files import make_directory

        config = self._source_config()
        images = self.load(name, work.report).train800val200
        start = random_prompt(self.backbone, self.plan.tokens, deep=self.plan.deep, seed=self.plan.pool_seed)
        tuned = tune(
            self.backbone, {name: start}, images, config=config,
            checkpoint=work.checkpoints / "tuning.safetensors", progress=work.report, stage=f"source {name}",
        )  # fmt: skip
        last = tuned.history[-1]
        training = {k: v for k, v in dataclasses.asdict(config).items() if k != "seed"}
        training |= {"images": len(images), "classes": images.num_classes, "data": self.task(name).digest[:16]}
        training |= {"train_accuracy": last["train_accuracy"][0], "loss": last["loss"][0]}
        record = {"task": name, "init_seed": config.seed, "training": training}
        make_directory(self.out / "sources")
        prompt = PromptPool({name: tuned.prompt(name)}, backbone=self.backbone.info, metadata={name: record})
        prompt.save(self._source_file(name))  # before the cell's own file: a finished cell has its prompt
        return {"train_accuracy": last["train_accuracy"][0], "loss": last["loss"][0], "seconds": tuned.seconds}


def _task_of(name: str) -> str:
    """The task that a prompt is of, by any of the task's names, or by its title ("CIFAR-100"): a folder "pets" holds
    VTAB's Pets as likely as not, and a prompt too few in the pool is better than the target's own."""
    titles = {task.title.casefold(): task.name for task in VTAB}
    return titles.get(name.casefold(), canonical(name))


def _digest(prompts: dict[str, Tensor], more: str) -> str:
    digest = hashlib.sha256(more.encode())
    for name, prompt in prompts.items():
        digest.update(f"{name}{prompt.dtype}{list(prompt.shape)}".encode())
        digest.update(prompt.numpy().tobytes())
    return digest.hexdigest()
