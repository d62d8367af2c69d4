"""What a pool costs on other machines, on paper: python benchmarks/scaling.py [--count]

Prints the tables of docs/scaling.md: operations by the model of flops.py, statistics by `hgprompt.footprint`, seconds
from the rates below. --count holds the model against the operations that PyTorch counts in a real pass.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from flops import VIT_B16, Network

from hgprompt import footprint

IMAGES, CLASSES = 2000, 10
POOLS = (13, 512, 100_000)
TOURNAMENT = (512, 13)
"""Prompts that are weighed against one another, and how many of them go on."""
HALVING = 0.25
"""Share of images × prompts that `select_prompts` spends (its budget)."""
ASSUMED_SHARE = 0.5
"""Of a GPU's peak that the network reaches. An assumption: not measured."""
RATES = {  # FLOP/s
    "two CPU cores, float32": 201e9,
    "two CPU cores, bfloat16": 645e9,
    "one A800": ASSUMED_SHARE * 312e12,
    "8 × A800": 8 * ASSUMED_SHARE * 312e12,
    "64 × A800": 64 * ASSUMED_SHARE * 312e12,
}
"""CPU: measured on ViT-B/16's forward pass (docs/measured.md). GPU: the data sheet (dense bfloat16), its share."""


def operations(prompts: int) -> tuple[float, str]:
    """For α over a pool: all at once up to 512, and in rounds of 512 beyond."""
    if prompts <= TOURNAMENT[0]:
        return VIT_B16.run(IMAGES, prompts), "all together"
    total, rounds = 0.0, 0
    while prompts > TOURNAMENT[1]:
        # Selection reads images under a quarter of the pairs, and takes no gradients.
        total += HALVING * IMAGES * prompts * VIT_B16.forward(useful=True)
        prompts = -(-prompts // TOURNAMENT[0]) * TOURNAMENT[1]
        rounds += 1
    return total + VIT_B16.run(IMAGES, TOURNAMENT[1]), f"{rounds} rounds of 512 → 13"


def in_words(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def pools() -> None:
    print(f"| prompts | how | PFLOP | {' | '.join(RATES)} |")
    print("|---:|---|---:|" + "---:|" * len(RATES))
    for prompts in POOLS:
        work, how = operations(prompts)
        times = " | ".join(in_words(work / rate) for rate in RATES.values())
        print(f"| {prompts:,} | {how} | {work / 1e15:,.2f} | {times} |")


def statistics() -> None:
    print("| M | N | features, GB | moments, GB |")
    print("|---:|---:|---:|---:|")
    for prompts in (13, 128, 512):
        for images in (2_000, 50_000, 1_000_000):
            size = footprint(prompts, VIT_B16.width, images, num_classes=CLASSES)
            print(f"| {prompts} | {images:,} | {size['features'].kept / 1e9:.3g} | {size['moments'].kept / 1e9:.3g} |")


def count() -> None:
    """The model beside PyTorch's own counter (convolution of the patches included), by prompts and kind."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    from hgprompt import FrozenViT, encode

    vit = FrozenViT.from_timm(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=112))
    network = Network(vit.width, vit.depth, vit.num_image_tokens, 10)
    for deep in (False, True):
        network = dataclasses.replace(network, deep=deep)
        for prompts in (2, 8):
            shape = (prompts, vit.depth, 10, vit.width) if deep else (prompts, 10, vit.width)
            leaf, images = torch.randn(shape, requires_grad=True), torch.randn(4, 3, 112, 112)
            counted = []
            for backward in (False, True):
                with FlopCounterMode(display=False) as counter:
                    features = encode(vit, leaf if backward else leaf.detach(), images)
                    if backward:
                        features.square().sum().backward()
                counted.append(counter.get_total_flops() / (prompts * len(images)))
            expected = [network.forward(useful=True), network.backward(useful=True)]
            ratios = [counted[0] / expected[0], (counted[1] - counted[0]) / expected[1]]
            kind = "deep" if deep else "shallow"
            print(f"{kind}, M={prompts}: counted / model = {ratios[0]:.3f} forward, {ratios[1]:.3f} backward")


if __name__ == "__main__":
    if "--count" in sys.argv:
        count()
    else:
        pools()
        print()
        statistics()
