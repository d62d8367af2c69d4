"""ATTEMPT: every image mixes the sources and the target prompt by attention (Asai et al., EMNLP 2022).

x̂ = max over an image's patch tokens, P̂_j = max over a prompt's tokens (of all layers, where it is deep); with
h = LayerNorm(W_up · SiLU(W_down x̂)), a = softmax(P̂ h / T) over M sources and the target, and the prompt of the image is
Σ_j a_j P_j + P_target. Sources are frozen; P_target and the attention are trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from hgprompt.backbone import FrozenViT
from hgprompt.encoder import MicroBatch, encode, pull_back
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.learner import HEAD, Learner, cross_entropies, linear_head, linear_logits, on_host
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.methods.start import prompt_size, sources
from hgprompt.tuning.streams import stream, uniform_within

HIDDEN = 100
"""Width of the attention's inner layer."""
_WARMUP_STEPS, _MOST_WARMUP = 500, 1 / 3


class AttemptLearner(Learner):
    """R runs over the same sources [M, p, d] or [M, L, p, d]."""

    def __init__(self, backbone: FrozenViT, sources: Tensor, parameters: Sequence[Mapping[str, Tensor]]) -> None:
        self.backbone, self.parameters = backbone, parameters
        self.sources = sources.to(backbone.device, torch.float32)
        self.source_keys = prompt_keys(self.sources)
        self.micro_batch = MicroBatch()  # one for all steps: what a GPU had no memory for is not tried again

    def instance_prompts(self, images: Tensor) -> Tensor:
        """A prompt for every image, [R, B, p, d] or [R, B, L, p, d]; images [B, 3, H, W] or [R, B, 3, H, W]."""
        x = self.pooled(images)
        answers = []
        for r, own in enumerate(self.parameters):
            a = attention(x if x.ndim == 2 else x[r], self.source_keys, own)
            mixed = torch.tensordot(a, torch.cat([self.sources, own["prompt"][None]]), dims=1)
            answers.append(mixed + own["prompt"])
        return torch.stack(answers)

    def logits(self, inputs: Tensor, *, step: int | None = None) -> Tensor:
        prompts = self.instance_prompts(inputs)
        features = encode(self.backbone, prompts.flatten(0, 1), self._spread(inputs), micro_batch=self.micro_batch)
        return linear_logits(features.view(*prompts.shape[:2], -1), self.parameters)

    def backward(self, inputs: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        prompts = self.instance_prompts(inputs)
        runs, images = prompts.shape[:2]
        labels = labels.to(self.backbone.device).expand(runs, images)
        weight, bias = (torch.stack([p[f"{HEAD}.{n}"].detach() for p in self.parameters]) for n in ("weight", "bias"))
        run_of = torch.arange(runs, device=self.backbone.device).repeat_interleave(images)

        def loss(features: Tensor, pairs: slice, _: slice) -> Tensor:
            # Each pair of a run and an image is a prompt with one image, and takes the head of its run.
            own = run_of[pairs]
            logits = torch.baddbmm(bias[own][:, None], features.float(), weight[own].mT)
            return cross_entropies(logits, labels.reshape(-1, 1)[pairs])[0]

        features, _, gradient = pull_back(
            self.backbone, prompts.detach().flatten(0, 1), self._spread(inputs), loss, micro_batch=self.micro_batch
        )
        losses, correct = cross_entropies(linear_logits(features.view(runs, images, -1), self.parameters), labels)
        (losses.sum() / images).backward()
        prompts.backward(gradient.view_as(prompts).to(prompts.dtype) / images)
        return on_host(losses, correct)

    def pooled(self, images: Tensor) -> Tensor:
        """x̂ [B, d] or [R, B, d], float32."""
        vit = self.backbone
        with torch.no_grad():
            tokens = vit.embed(vit.prepare(images.flatten(0, -4)))[:, vit.num_prefix_tokens :]
            return tokens.float().amax(1).unflatten(0, images.shape[:-3])

    def _spread(self, images: Tensor) -> Tensor:
        """Images of every run, one by one: [R·B, 1, 3, H, W]."""
        runs = len(self.parameters)
        return (images.expand(runs, *images.shape[-4:])).flatten(0, 1)[:, None]


def prompt_keys(prompts: Tensor) -> Tensor:
    """P̂ [M, d] of prompts [M, p, d] or [M, L, p, d]."""
    return prompts.flatten(1, -2).amax(1)


def attention(x: Tensor, source_keys: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """a [B, M + 1] of pooled images [B, d] over sources' keys [M, d] and the target's prompt."""
    d = x.shape[-1]
    h = silu(x @ own["attention.down"].T) @ own["attention.up"].T
    h = layer_norm(h, (d,), own["attention.norm.weight"], own["attention.norm.bias"])
    keys = torch.cat([source_keys, prompt_keys(own["prompt"][None])])
    return (h @ keys.T / (d * math.e)).softmax(-1)


class ATTEMPT(Method):
    """The rate is chosen from the prompts' grid like any other's (the authors' 0.3, at a batch of 64, is a base rate of
    1.2). Their 500 steps of warm-up are kept, up to a third of the run: short runs would be nothing else."""

    name = "ATTEMPT"
    kind = "prompt"
    uses_pool = True
    runs_at_once = 8  # a prompt for every image of a batch and run

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        vit, pool = setting.backbone, sources(setting)
        stack = pool.stack()
        parameters = []
        for config in configs:
            own = attention_start(vit.width, config.seed) | {"prompt": stack[0].float()}
            moved = {name: value.to(vit.device).clone().requires_grad_() for name, value in own.items()}
            parameters.append(moved | linear_head(vit.width, setting.num_classes, config.seed, vit.device))
        first = configs[0]
        steps = first.epochs * -(-len(setting.train) // first.batch_size)
        warmup = min(_WARMUP_STEPS / steps, _MOST_WARMUP)
        return Prepared(
            AttemptLearner(vit, stack, parameters),
            report={"target starts from": pool.names[0]},
            configs=[dataclasses.replace(config, warmup=warmup) for config in configs],
        )

    def num_parameters(self, setting: Setting) -> int:
        """The target prompt, d·100 down and up, and a LayerNorm."""
        d = setting.backbone.width
        return prompt_size(setting) + 2 * HIDDEN * d + 2 * d


def attention_start(width: int, seed: int) -> dict[str, Tensor]:
    """G's parameters as nn.Linear and nn.LayerNorm draw them, without biases in the linear maps."""
    generator = stream(seed, "attention")

    def linear(rows: int, columns: int) -> Tensor:
        return uniform_within(columns**-0.5, generator, rows, columns)

    return {
        "attention.down": linear(HIDDEN, width),
        "attention.up": linear(width, HIDDEN),
        "attention.norm.weight": torch.ones(width, dtype=torch.float32, device="cpu"),
        "attention.norm.bias": torch.zeros(width, dtype=torch.float32, device="cpu"),
    }
