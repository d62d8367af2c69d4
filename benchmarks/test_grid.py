"""A grid of learning rates and decays, trained side by side, beside the same grid point by point.

Both train the same runs on the same batches; the losses agree (checked). Side by side, every point shares the work on
the images that no prompt touches, and its matrices are larger.
"""

from __future__ import annotations

import pytest
import torch

from hgprompt import load_backbone
from hgprompt.data import LabelledImages
from hgprompt.tuning import PromptLearner, TuneConfig, random_prompt, train
from hgprompt.tuning.protocol import Grid

GRID = Grid((1.0, 0.25), (0.001, 0.0))


@pytest.mark.parametrize("seeds", [1, 3], ids=["one-seed", "three-seeds"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_grid(paired, benchmark, deep, seeds):
    vit = load_backbone("mini")
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 3, *vit.image_size), generator=g, dtype=torch.uint8)
    images = LabelledImages("noise", pixels, torch.arange(32) % 10)
    # Selection trains a grid with one seed, the final runs one point with three.
    points = GRID.configs(TuneConfig(epochs=1, batch_size=16), "prompt")
    configs = points if seeds == 1 else [TuneConfig(epochs=1, batch_size=16, seed=seed) for seed in (42, 44, 82)]

    def run(chosen):
        starts = [random_prompt(vit, 10, deep=deep, seed=config.seed) for config in chosen]
        learner = PromptLearner(vit, PromptLearner.start(vit, starts, 10, chosen), chosen)
        return train(learner, chosen, images).history[-1]["loss"]

    def side_by_side():
        return run(configs)

    def one_by_one():
        return [run([config])[0] for config in configs]

    assert side_by_side() == pytest.approx(one_by_one(), rel=1e-4)  # float32, in other blockings
    benchmark.group = "grid"
    paired(side_by_side, one_by_one, rounds=3)
