"""The options of a pass: what they accept, and what hangs on which of them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hgprompt import OptionError, fast_ensemble
from hgprompt.options import Options

DEFAULTS = {
    "lam": 1.0, "shrinkage": "auto", "seed": 0, "shard": "images", "head": "shared-lda", "gradient_images": 256,
    "folds": 8, "preset": None, "normalize": True, "solver": "quasi-newton", "starts": 8, "tolerance": None,
    "gap_tolerance": 1e-6, "max_steps": None, "learning_rate": 0.005, "keep": "auto", "max_bytes": None,
    "micro_batch": None, "impl": "auto",
}  # fmt: skip
# What a checkpoint's identity has of the options: an interrupted pass is refused by a program with other keys.
OF_EVERY_PASS = {"folds", "keep", "gradient_images", "seed", "impl", "micro_batch", "tolerance"}
OF_ONE_THAT_MAY_STOP = OF_EVERY_PASS | {
    "lam", "shrinkage", "normalize", "solver", "starts", "gap_tolerance", "max_steps", "learning_rate",
}  # fmt: skip


def test_what_a_checkpoint_depends_on():
    assert set(Options(**DEFAULTS).gathering) == OF_EVERY_PASS
    stopping = Options(**DEFAULTS | {"tolerance": 0.1}).gathering
    assert set(stopping) == OF_ONE_THAT_MAY_STOP
    assert (stopping["tolerance"], stopping["gap_tolerance"]) == (0.1, 1e-6)  # one is of the stream, one of the solver


def test_the_papers_preset_overrides():
    paper = Options(**DEFAULTS | {"preset": "paper", "shrinkage": 0.3, "starts": 5, "learning_rate": 0.1})
    assert paper.solving == {
        "shrinkage": 0.0, "normalize": False, "solver": "projected-gradient", "starts": 1, "tolerance": 1e-6,
        "max_steps": 1000, "learning_rate": 0.1, "seed": 0,
    }  # fmt: skip
    assert paper.deciding["gradient_images"] is None
    assert Options(**DEFAULTS | {"preset": "paper", "max_steps": 7}).max_steps == 7


def test_numbers_of_numpy_become_pythons():
    numbers = {"lam": np.float32(0.5), "seed": np.int64(3), "folds": np.int32(4), "shrinkage": np.float32(0.25)}
    options = Options(**DEFAULTS | numbers | {"tolerance": np.float64(0.2), "micro_batch": np.int16(8)})
    plain = Options(**DEFAULTS | {k: v.item() for k, v in numbers.items()} | {"tolerance": 0.2, "micro_batch": 8})
    assert json.dumps(options.gathering | options.deciding) == json.dumps(plain.gathering | plain.deciding)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"preset": "papers"}, "preset"), ({"tolerance": -1}, "tolerance"), ({"tolerance": 0.1, "folds": 1}, "folds"),
        ({"micro_batch": 0}, "micro_batch"), ({"lam": "1"}, "lam"), ({"shard": "rows"}, "shard"),
        ({"head": "svm"}, "head"), ({"gradient_images": 0}, "nothing to align"), ({"max_steps": 0}, "max_steps"),
    ],
)  # fmt: skip
def test_refused_before_any_network_is_built(bad, said):
    with pytest.raises(OptionError, match=said):
        fast_ensemble([], [], backbone="no_such_network", **bad)
