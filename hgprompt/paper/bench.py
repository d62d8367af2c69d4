"""The bench: one method on one task, as VTAB wants it. Rates are chosen on val200, then all 1,000 images are used.

Settings compete on train800, judged on val200 after the last epoch (ties: the smaller rate); the winner is tuned anew
on train800val200, once per seed, and tested once (Zhai et al. 2019, and VPT's protocol).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hgprompt.data import LabelledImages
from hgprompt.data.folders import available_cores
from hgprompt.errors import OptionError
from hgprompt.paper.cells import Cell, Work
from hgprompt.paper.lab import Lab
from hgprompt.paper.starts import Mixed, Weighing, mix
from hgprompt.tuning import TuneConfig, tune

VPT, SINGLE, UNIFORM, HGPROMPT = "VPT", "best single", "uniform", "HGPrompt"
STARTS: dict[str, Weighing | None] = {
    VPT: None,
    SINGLE: Weighing("single"),
    UNIFORM: Weighing("uniform"),
    HGPROMPT: Weighing("hgprompt"),
}
"""Methods that differ in where the prompt starts; None: a random one, drawn anew with every seed."""
_GRIDS = {
    "full": ((50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05), (0.01, 0.001, 0.0001, 0.0)),
    "quick": ((25, 10, 2.5, 0.5), (0.0001,)),
}
"""Base learning rates and weight decays; "full" is VPT's for prompts."""


def weighing_of(method: str, lam: float) -> Weighing | None:
    """What a name says: "HGPrompt λ=0" is HGPrompt with a λ of its own.

    Raises:
        OptionError: no such method.
    """
    name, _, own = method.partition(" λ=")
    if name not in STARTS or (own and name != HGPROMPT):
        raise OptionError(f"no method is called {method!r}: there are {', '.join(STARTS)}")
    weighing = STARTS[name]
    if weighing is None or name != HGPROMPT:
        return weighing
    return dataclasses.replace(weighing, lam=float(own) if own else lam)


def method_cell(lab: Lab, method: str, task: str) -> Cell:
    """The cell of a method on a task: accuracies per seed, and all that led to them."""
    plan = lab.plan
    weighing = weighing_of(method, plan.lam)
    sources = () if weighing is None else lab.sources(without=task)
    options = {
        "method": method.partition(" ")[0] if weighing is None else dataclasses.asdict(weighing),
        "pool": lab.pool_identity(sources), "seeds": list(plan.seeds), "epochs": plan.epochs,
        "batch_size": plan.batch_size, "grid": [list(v) for v in _GRIDS[plan.grid]], "test_limit": plan.test_limit,
    }  # fmt: skip
    settings = len(_GRIDS[plan.grid][0]) * len(_GRIDS[plan.grid][1])
    return Cell(
        f"{canonical_key(method)}.{lab.task(task).name}",
        lab.identity(task, **options),
        lambda work: _evaluate(lab, method, task, work),
        cost=plan.epochs * (0.8 * settings + len(plan.seeds)),
    )


def canonical_key(method: str) -> str:
    """A method's name within a cell's key."""
    return method.replace(" λ=", "-lambda-").replace(" ", "-")


def _evaluate(lab: Lab, method: str, task: str, work: Work) -> dict[str, Any]:
    plan, weighing, loaded = lab.plan, weighing_of(method, lab.plan.lam), lab.load(task, work.report)
    pool = None if weighing is None else lab.pool(lab.sources(without=task))

    def start(images: LabelledImages, seed: int) -> Mixed:
        if weighing is None or pool is None:
            return Mixed(lab.random_start(seed))
        return mix(lab.backbone, pool, images, weighing, seed=plan.seeds[0], report=work.report)

    title = f"{method}, {lab.task(task).title}"
    seconds = 0.0
    validation: list[dict[str, float]] = []
    first = start(loaded.train800, plan.seeds[0])
    for lr, decay in itertools.product(*_GRIDS[plan.grid]):
        config = _config(lab, lr, decay, plan.seeds[0])
        accuracy, took = _tuned(lab, first.prompt, loaded.train800, loaded.val200, config, work, title)
        seconds += took
        validation.append({"lr": lr, "weight_decay": decay, "accuracy": accuracy})
    best = choose(validation)
    accuracies = []
    final = start(loaded.train800val200, plan.seeds[0])
    for seed in plan.seeds:
        begin = final if weighing is not None else start(loaded.train800val200, seed)
        config = _config(lab, best["lr"], best["weight_decay"], seed)
        accuracy, took = _tuned(lab, begin.prompt, loaded.train800val200, loaded.test, config, work, title)
        seconds += took
        accuracies.append(accuracy)
    return {
        "accuracies": accuracies, "seeds": list(plan.seeds), "chosen": best, "validation": validation,
        "parameters": first.prompt.numel(), "epochs": plan.epochs, "seconds": seconds,
        "test_images": len(loaded.test), "report": final.report,
    }  # fmt: skip


def choose(validation: Sequence[dict[str, float]]) -> dict[str, float]:
    """The setting with the highest accuracy; of equal ones the smaller rate, then the smaller decay."""
    return min(validation, key=lambda v: (-v["accuracy"], v["lr"], v["weight_decay"]))


def _config(lab: Lab, lr: float, decay: float, seed: int) -> TuneConfig:
    plan = lab.plan
    return TuneConfig(
        epochs=plan.epochs, batch_size=plan.batch_size, lr=lr, weight_decay=decay, seed=seed,
        prompt_dropout=0.1 if plan.deep else 0.0,
    )  # fmt: skip


def _tuned(
    lab: Lab, prompt: Tensor, train: LabelledImages, test: Any, config: TuneConfig, work: Work, title: str
) -> tuple[float, float]:
    """Accuracy on `test` after the last epoch, and seconds. NaN-free: a rate that diverges has accuracy 0."""
    from hgprompt.errors import DataError

    name = f"{len(train)}-{config.lr:g}-{config.weight_decay:g}-{config.seed}.safetensors"
    try:
        result = tune(
            lab.backbone, {"start": prompt}, train, test=test, num_classes=lab.task(train.name).num_classes,
            config=config, checkpoint=work.checkpoints / name, progress=work.report, stage=title,
            workers=available_cores(),
        )  # fmt: skip
    except DataError as error:
        if "not finite" not in str(error):
            raise
        return 0.0, 0.0
    return result.accuracy("start"), result.seconds
