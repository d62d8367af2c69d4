"""Controls: starts that any gain of α must be held against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hgprompt.backbone import FrozenViT
from hgprompt.encoder import MicroBatch, encode
from hgprompt.errors import OptionError
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.learner import Learner, linear_head, linear_logits
from hgprompt.tuning.method import Cost, Prepared, Setting
from hgprompt.tuning.methods.hgprompt import HGPrompt
from hgprompt.tuning.methods.start import Start, StartMethod, brief_config, mixture, named, sources
from hgprompt.tuning.methods.vpt import VPT
from hgprompt.tuning.prompts import PromptLearner, pull_back_runs
from hgprompt.tuning.streams import stream
from hgprompt.tuning.trainer import train

_HELD_OUT = 0.2
_WEIGHT_RATE = 0.1


class Uniform(StartMethod):
    """The mean of all sources."""

    name = "uniform"
    uses_pool = True

    def start(self, setting: Setting, seed: int) -> Start:
        pool = sources(setting)
        return Start(mixture(pool, torch.full((len(pool),), 1 / len(pool), dtype=torch.float64, device="cpu")))


class FittedUniform(Uniform):
    """The same under a head in closed form."""

    name = "uniform, fitted head"
    head = "fitted"
    revision = 1


class RandomWeights(StartMethod):
    """α uniform on the simplex, Dirichlet(1), drawn with the seed."""

    name = "random α"
    uses_pool = True

    def start(self, setting: Setting, seed: int) -> Start:
        pool = sources(setting)
        generator = stream(seed, "weights")
        # Exponential variables, divided by their sum. 1 - u is never 0.
        drawn = -torch.log(1 - torch.rand(len(pool), generator=generator, dtype=torch.float64, device="cpu"))
        weights = drawn / drawn.sum()
        return Start(mixture(pool, weights), report={"weights": named(pool, weights)})


class BestSingle(StartMethod):
    """The source from which a short tuning gets furthest: by accuracy on a fifth of the training images, held out and
    drawn with the seed, after `epochs` on the others. Of equal ones the first."""

    name = "best single"
    uses_pool = True

    def __init__(self, epochs: int = 2) -> None:
        if epochs < 1:
            raise OptionError(f"epochs must be at least 1, got {epochs}")
        self.epochs = epochs

    def start(self, setting: Setting, seed: int) -> Start:
        pool, images = sources(setting), setting.train
        order = torch.randperm(len(images), generator=stream(seed, "held out"), device="cpu")
        held_out = max(1, round(_HELD_OUT * len(images)))
        rest = images.subset(order[held_out:])
        configs = [brief_config(self.epochs, seed)] * len(pool)
        learner = PromptLearner.of(setting.backbone, list(pool.values()), setting.num_classes, configs)
        trained = train(learner, configs, rest, images.subset(order[:held_out]), num_classes=setting.num_classes)
        found = torch.tensor(trained.accuracies, dtype=torch.float64, device="cpu")
        best = pool.names[int(found.argmax())]
        cost = Cost(forward=held_out * len(pool), backward=self.epochs * len(rest) * len(pool))
        return Start(pool[best], cost, {"source": best, "accuracies": named(pool, found)})


class EqualCompute(VPT):
    """A random start, and as many more epochs as HGPrompt's α costs; rounded up, in favour of the control."""

    name = "random, equal compute"
    uses_pool = True

    def __init__(self, against: HGPrompt | None = None) -> None:
        self.against = against or HGPrompt()

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        extra = math.ceil(self.against.cost(setting).epochs(len(setting.train)))
        longer = [dataclasses.replace(config, epochs=config.epochs + extra) for config in configs]
        prepared = super().prepare(setting, longer)
        return dataclasses.replace(prepared, configs=longer, report={"extra epochs": extra})


class WeightLearner(Learner):
    """α = softmax(weights) over sources [M, p, d] or [M, L, p, d] and a linear head, for each run."""

    def __init__(self, backbone: FrozenViT, sources: Tensor, parameters: Sequence[Mapping[str, Tensor]]) -> None:
        self.backbone, self.parameters = backbone, parameters
        self.sources = sources.to(backbone.device, torch.float32)
        self.micro_batch = MicroBatch()  # one for all steps: what a GPU had no memory for is not tried again

    def prompts(self) -> Tensor:
        """Σ α_i P_i of each run."""
        weights = torch.stack([own["weights"] for own in self.parameters]).softmax(1)
        return torch.tensordot(weights, self.sources, dims=1)

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        features = encode(self.backbone, self.prompts(), inputs, micro_batch=self.micro_batch)
        return linear_logits(features, self.parameters)

    def backward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        prompts = self.prompts()
        losses, correct, gradient = pull_back_runs(
            self.backbone, prompts.detach(), inputs, labels, self.parameters, micro_batch=self.micro_batch
        )
        prompts.backward(gradient.to(prompts.dtype))
        return losses, correct


class CrossEntropyWeights(StartMethod):
    """α by the cross-entropy of the mixed prompt itself on the training images, with a head that learns beside it."""

    name = "α by cross-entropy"
    uses_pool = True

    def __init__(self, epochs: int = 5) -> None:
        if epochs < 1:
            raise OptionError(f"epochs must be at least 1, got {epochs}")
        self.epochs = epochs

    def start(self, setting: Setting, seed: int) -> Start:
        pool, vit = sources(setting), setting.backbone
        config = brief_config(self.epochs, seed)
        config = dataclasses.replace(config, lr=_WEIGHT_RATE * 256 / config.batch_size)
        own = {
            "weights": torch.zeros(len(pool), dtype=torch.float32, device=vit.device, requires_grad=True),
            **linear_head(vit.width, setting.num_classes, seed, vit.device),
        }
        learner = WeightLearner(vit, pool.stack(), [own])
        train(learner, [config], setting.train, num_classes=setting.num_classes)
        weights = own["weights"].detach().double().softmax(0).cpu()
        cost = Cost(backward=self.epochs * len(setting.train))
        return Start(mixture(pool, weights), cost, {"weights": named(pool, weights)})
