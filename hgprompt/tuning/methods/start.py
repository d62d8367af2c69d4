"""Methods that are a start: they differ in the prompt that tuning begins with, and in nothing else."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from hgprompt.errors import PromptError
from hgprompt.pool import PromptPool
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.head import HeadStart
from hgprompt.tuning.method import Cost, Method, Prepared, Setting
from hgprompt.tuning.prompts import PromptLearner
from hgprompt.tuning.start import random_prompt
from hgprompt.tuning.trainer import train

# Rates of an AdamW that learns a little of a task in an epoch or two, whatever the task: for prompts that are not
# results, but measure something. Sources of a pool are tuned with about these, too.
_PROMPT_RATE, _HEAD_RATE = 0.02, 0.005
_BATCH = 32

Found = TypeVar("Found")


class Start(NamedTuple):
    """Where a run starts: a prompt [p, d] or [L, p, d], what it cost to find, and what to report of it (JSON-able)."""

    prompt: Tensor
    cost: Cost = Cost()
    report: Mapping[str, object] = MappingProxyType({})


class StartMethod(Method):
    """A prompt and a linear head, trained from a start that the subclass finds."""

    kind = "prompt"
    head: ClassVar[HeadStart] = "random"

    @abstractmethod
    def start(self, setting: Setting, seed: int) -> Start:
        """Find the start of a run with this seed."""

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        starts, cost, reports = per_seed(configs, lambda seed: self.start(setting, seed))
        learner = PromptLearner.of(setting.backbone, starts, setting.num_classes, configs, head=self.head)
        if self.head == "fitted":
            cost += Cost(forward=len(setting.train) * len({config.seed for config in configs}))
        return Prepared(learner, cost, reports)

    def num_parameters(self, setting: Setting) -> int:
        """p·d, in every block of a deep prompt."""
        return prompt_size(setting)


def per_seed(
    configs: Sequence[TuneConfig], find: Callable[[int], tuple[Found, Cost, Mapping[str, object]]]
) -> tuple[list[Found], Cost, dict[str, object]]:
    """What is found for each config's seed, once for each seed; the cost of all, and the reports by seed."""
    found = {seed: find(seed) for seed in dict.fromkeys(config.seed for config in configs)}
    cost = sum((answer[1] for answer in found.values()), Cost())
    reports: dict[str, object] = {f"seed {seed}": dict(answer[2]) for seed, answer in found.items() if answer[2]}
    return [found[config.seed][0] for config in configs], cost, reports


def prompt_size(setting: Setting) -> int:
    """Numbers in a prompt."""
    return math.prod(prompt_shape(setting))


def prompt_shape(setting: Setting) -> tuple[int, ...]:
    """(p, d), or (L, p, d) of a deep prompt."""
    vit = setting.backbone
    return (vit.depth,) * setting.deep + (setting.num_tokens, vit.width)


def sources(setting: Setting) -> PromptPool:
    """The setting's pool.

    Raises:
        PromptError: there is none, or its prompts are not of the setting's shape and backbone.
    """
    pool = setting.pool
    if pool is None:
        raise PromptError("this method starts from other tasks' prompts: give the setting a pool")
    pool.check_backbone(setting.backbone.info)
    shape = tuple(pool[pool.names[0]].shape)
    if shape != prompt_shape(setting):
        raise PromptError(f"the pool's prompts are {list(shape)}, the setting's are {list(prompt_shape(setting))}")
    return pool


def random_start(setting: Setting, seed: int) -> Tensor:
    """VPT's, with the setting's shape."""
    return random_prompt(setting.backbone, setting.num_tokens, deep=setting.deep, seed=seed)


def brief_config(epochs: int, seed: int) -> TuneConfig:
    """A short tuning whose result is a measurement."""
    scale = 256 / _BATCH
    return TuneConfig(
        epochs=epochs, batch_size=_BATCH, optimizer="adamw", lr=_PROMPT_RATE * scale, head_lr=_HEAD_RATE * scale,
        weight_decay=0.0, warmup=0.0, seed=seed,
    )  # fmt: skip


def early_prompt(setting: Setting, seed: int, epochs: int) -> tuple[Tensor, Cost]:
    """A target prompt [p, d] or [L, p, d] after a few epochs: what the target wants, roughly.

    It starts where the sources did, if their records agree on it, and from a random start of the run's own if not: how
    much two prompts are alike means little where they began apart.
    """
    configs = [brief_config(epochs, seed)]
    common = _common_seed(setting.pool)
    starts = [random_start(setting, seed if common is None else common)]
    learner = PromptLearner.of(setting.backbone, starts, setting.num_classes, configs)
    train(learner, configs, setting.train, num_classes=setting.num_classes)
    return learner.parameters[0]["prompt"].detach().cpu(), Cost(backward=epochs * len(setting.train))


def _common_seed(pool: PromptPool | None) -> int | None:
    """The seed of the random start that all sources began from, as their records say."""
    seeds = [record.get("init_seed") for record in pool.metadata.values()] if pool is not None else []
    first = seeds[0] if seeds else None
    agree = all(type(seed) is int and seed == first for seed in seeds)
    return first if type(first) is int and agree and 0 <= first < 2**63 else None


def mixture(pool: PromptPool, weights: Tensor) -> Tensor:
    """Σ α_i P_i, summed in float64."""
    stack = pool.stack()
    return torch.tensordot(weights.double().cpu(), stack.double(), dims=1).to(stack.dtype)


def named(pool: PromptPool, values: Tensor) -> dict[str, float]:
    """{name: value} of one number for each source."""
    return dict(zip(pool.names, values.tolist(), strict=True))
