"""The bench: cells of one method on one task, by VTAB's protocol (`hgprompt.tuning.protocol`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from hgprompt.data.folders import available_cores
from hgprompt.errors import OptionError
from hgprompt.paper.cells import Cell, Work
from hgprompt.paper.lab import Lab
from hgprompt.tuning.method import Method, identified
from hgprompt.tuning.methods import (
    CONTROLS,
    METHODS,
    MLP,
    FittedHGPrompt,
    HGPrompt,
    PaperHGPrompt,
    Partial,
    RawHGPrompt,
)
from hgprompt.tuning.protocol import GRIDS, select_and_retrain

COMPARED: dict[str, Method] = METHODS | CONTROLS
_WITH_LAMBDA = {kind.name: kind for kind in (HGPrompt, RawHGPrompt, PaperHGPrompt, FittedHGPrompt)}
_WITH_LAYERS: dict[str, Callable[[int], Method]] = {"PARTIAL": Partial, "MLP": MLP}


def method_of(name: str, lam: float = 1.0) -> Method:
    """A method by its name. HGPrompt (also with raw H, as the paper has it, or under a fitted head) has the given λ,
    and "HGPrompt λ=0" its own; PARTIAL-k and MLP-k have any k.

    Raises:
        OptionError: no such method.
    """
    plain, _, own = name.partition(" λ=")
    if plain in _WITH_LAMBDA:
        try:
            return _WITH_LAMBDA[plain](float(own) if own else lam)
        except ValueError as error:
            raise OptionError(f"{name!r}: λ is a number from 0, got {own!r}") from error
    kind, _, layers = name.partition("-")
    if kind in _WITH_LAYERS and layers.isascii() and layers.isdecimal():
        return _WITH_LAYERS[kind](int(layers))
    if name not in COMPARED:
        raise OptionError(f"no method is called {name!r}: there are {'; '.join(COMPARED)}")
    return COMPARED[name]


def method_names(text: str) -> tuple[str, ...]:
    """Names of methods with commas between them; some have a comma of their own: "random, equal compute"."""
    names: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        whole = f"{names[-1]}, {part}" if names else ""
        if _is_method(whole):
            names[-1] = whole
        elif part:
            names.append(part)
    return tuple(names)


def _is_method(name: str) -> bool:
    try:
        method_of(name)
    except OptionError:
        return False
    return True


def method_cell(lab: Lab, name: str, task: str) -> Cell:
    """The cell of a method on a task. Its record: see `Outcome.record`, and the number of test images."""
    plan, method = lab.plan, method_of(name, lab.plan.lam)
    grid = GRIDS[plan.grid][method.kind]
    options = {
        **identified(method), "pool": lab.pool_identity(lab.sources(without=task)) if method.uses_pool else "",
        "seeds": list(plan.seeds), "epochs": plan.epochs, "batch_size": plan.batch_size,
        "grid": {name: value for name, value in dataclasses.asdict(grid).items() if value is not None},
        "test_limit": plan.test_limit,
    }  # fmt: skip
    return Cell(
        method_key(method, lab.task(task).name),
        lab.identity(task, **options),
        lambda work: _evaluate(lab, method, task, work),
        # Selection sees 800 of 1,000 images in an epoch. A fine-tuned network has gradients for its weights as well.
        cost=(0.8 * len(grid.rates) * len(grid.decays) + len(plan.seeds)) * (1.5 if method.kind == "fine-tune" else 1),
    )


def method_key(method: Method, task: str) -> str:
    """Of a method's cell on a task."""
    return method.name.replace(" λ=", "-lambda-").replace(", ", "-").replace(" ", "-") + f".{task}"


def _evaluate(lab: Lab, method: Method, task: str, work: Work) -> dict[str, Any]:
    plan, loaded = lab.plan, lab.load(task, work.report)
    names = lab.sources(without=task) if method.uses_pool else ()
    outcome = select_and_retrain(
        method, lab.setting(loaded.train800, names), loaded.val200, lab.setting(loaded.train800val200, names),
        loaded.test, grid=plan.grid, seeds=plan.seeds, config=lab.config(), folder=work.checkpoints,
        workers=available_cores(), progress=work.report,
    )  # fmt: skip
    return outcome.record() | {"test_images": len(loaded.test)}
