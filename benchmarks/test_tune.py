"""A tuning step (prompt, linear head, SGD, schedule), beside the same step written with timm's modules and autograd.

The plain loop is the reference of the tests: frozen weights without gradients, timm's fused attention, the same batches
in the same order and dtype. Both train one epoch from the same start; the losses agree (checked).
"""

from __future__ import annotations

import literal
import pytest
import timm
import torch

from hgprompt import FrozenViT
from hgprompt.bundled import mini_model
from hgprompt.data import LabelledImages
from hgprompt.tuning import TuneConfig, random_prompt, tune

CONFIG = TuneConfig(epochs=1, batch_size=16, lr=1.0, head_lr=1.0)


def _model(name):
    if name == "mini":
        model = mini_model()
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0, img_size=112)
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mini", "vit-b-16-112px"])
def test_step(paired, benchmark, name, dtype, deep, runs):
    if name != "mini" and runs > 1:
        pytest.skip("a minute per round")
    model = _model(name).to(dtype)
    vit = FrozenViT.from_timm(model)
    g = torch.Generator().manual_seed(0)
    count = 64 if name == "mini" else 32
    pixels = torch.randint(0, 256, (count, 3, *vit.image_size), generator=g, dtype=torch.uint8)
    images = LabelledImages("noise", pixels, torch.arange(count) % 10)
    starts = {f"run {k}": random_prompt(vit, 10, deep=deep, seed=k) for k in range(runs)}

    def ours():
        return tune(vit, starts, images, config=CONFIG).history[-1]["loss"]

    def theirs():
        losses = [literal.tune(model, start, images, CONFIG, 10)[2] for start in starts.values()]
        return [sum(run) / len(run) for run in losses]

    # bfloat16 rounds activations to 3 digits, in two orders; the loss is near log(10).
    assert ours() == pytest.approx(theirs(), rel=1e-4 if dtype == torch.float32 else 3e-2)
    benchmark.group = "tuning step"
    paired(ours, theirs)
