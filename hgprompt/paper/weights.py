"""How much of each source a method takes for a target: Fig. 4, and the gradients behind Fig. 3.

Each method says it in its own way. To lie in one picture they are laid on the simplex: SPoT's similarities and PANDA's
predicted transferabilities, not negative, over their sum; ATTEMPT's attention over the sources alone, mean over the
training images once it is trained; HGPrompt's α.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from hgprompt.ensemble import fast_ensemble
from hgprompt.errors import OptionError
from hgprompt.paper.bench import method_of
from hgprompt.paper.cells import Cell, Work
from hgprompt.paper.lab import Lab
from hgprompt.tuning.method import Method, Setting, identified
from hgprompt.tuning.methods import ATTEMPT, PANDA, HGPrompt, SPoT
from hgprompt.tuning.methods.attempt import AttemptLearner, attention
from hgprompt.tuning.methods.panda import transferability
from hgprompt.tuning.methods.start import early_prompt
from hgprompt.tuning.trainer import train

WEIGHING = ("SPoT", "ATTEMPT", "PANDA", "HGPrompt")
"""The four of Fig. 4."""
_ATTEMPT: dict[str, Any] = {"lr": 1.2, "optimizer": "adamw"}
"""As its authors train it; a base rate: theirs is 0.3 at our batch of 64. Nothing is selected here: a picture is of one
run."""


def weights_cell(lab: Lab, name: str, task: str) -> Cell:
    """α of a method for a target, its own prompt among the sources where it has one; record: weights {source: α}."""
    method, names, folder = method_of(name, lab.plan.lam), lab.sources(), lab.task(task)
    if not isinstance(method, (SPoT, ATTEMPT, PANDA, HGPrompt)):
        raise OptionError(f"{name} gives the sources no weights: fig4 shows {', '.join(WEIGHING)}")

    def run(work: Work) -> dict[str, Any]:
        images = lab.load(task, work.report).train800val200
        work.report(f"{name}, {folder.title}", 0, None)
        weights = _weights(lab, method, lab.setting(images, names), work)
        return {"weights": dict(zip(names, weights.tolist(), strict=True))}

    options = identified(method) | {"pool": lab.pool_identity(names), "seed": lab.plan.seeds[0]}
    if isinstance(method, ATTEMPT):
        options |= {"config": dataclasses.asdict(dataclasses.replace(lab.config(), **_ATTEMPT))}
    return Cell(f"weights.{method.name}.{folder.name}", lab.identity(task, **options), run)


def cosines_cell(lab: Lab, task: str) -> Cell:
    """Cosines of the gradients under each source but the target's own; record: names, cosines [M][M]."""
    names = lab.sources(without=task)

    def run(work: Work) -> dict[str, Any]:
        images = lab.load(task, work.report).train800val200
        found = fast_ensemble(
            lab.pool(names), images.batches(64), backbone=lab.backbone, seed=lab.plan.seeds[0], gradient_images=None,
            progress=work.report,
        )  # fmt: skip
        return {"names": list(names), "cosines": found.gradient_cosines.tolist()}

    # λ takes no part in the gradients; it stands here as files of before have it.
    options = {"pool": lab.pool_identity(names), "lam": 1.0, "seed": lab.plan.seeds[0]}
    options |= {"revision": HGPrompt.revision}
    return Cell(f"cosines.{lab.task(task).name}", lab.identity(task, **options), run)


def _weights(lab: Lab, method: Method, setting: Setting, work: Work) -> Tensor:
    """[M], float64, on the simplex."""
    assert setting.pool is not None
    names, seed = setting.pool.names, lab.plan.seeds[0]
    if isinstance(method, SPoT):
        return _on_simplex(_numbers(method.start(setting, seed).report["similarities"], names))
    if isinstance(method, PANDA):
        early, _ = early_prompt(setting, seed, method.epochs)
        values = [transferability(setting, prompt, early) for prompt in setting.pool.values()]
        return _on_simplex(torch.tensor(values, dtype=torch.float64))
    if isinstance(method, ATTEMPT):
        return _trained_attention(lab, method, setting, work)
    assert isinstance(method, HGPrompt)
    return _numbers(method.start(setting, seed).report["weights"], names)


def _trained_attention(lab: Lab, method: ATTEMPT, setting: Setting, work: Work) -> Tensor:
    config = dataclasses.replace(lab.config(), seed=lab.plan.seeds[0], **_ATTEMPT)
    prepared = method.prepare(setting, [config])
    learner = prepared.learner
    assert isinstance(learner, AttemptLearner)
    train(
        learner, prepared.configs or [config], setting.train, num_classes=setting.num_classes, strict=True,
        checkpoint=work.checkpoints / "attempt.safetensors", progress=work.report, stage=method.name,
    )  # fmt: skip
    own = {name: value.detach() for name, value in learner.parameters[0].items()}
    total = torch.zeros(len(learner.sources), dtype=torch.float64)
    for images, _ in setting.train.batches(64):
        with torch.no_grad():
            total += attention(learner.pooled(images), learner.source_keys, own)[:, :-1].double().sum(0).cpu()
    return _on_simplex(total)


def _on_simplex(values: Tensor) -> Tensor:
    """Not negative, summing to 1; uniform where no value is positive."""
    kept = values.clamp_min(0)
    return kept / kept.sum() if kept.sum() > 0 else torch.full_like(kept, 1 / len(kept))


def _numbers(of_source: object, names: tuple[str, ...]) -> Tensor:
    assert isinstance(of_source, dict)
    return torch.tensor([of_source[name] for name in names], dtype=torch.float64)
