"""The paper's setting whole, 2,000 images × 13 prompts to convergence: python benchmarks/gpu_paper.py out.json

ViT-B/16 with random weights, images of ten classes made of noise about ten means: what the network computes does not
depend on what it sees. Two runs: the defaults (gradients from 256 images), and gradients of all images.
--profile: instead, which kernels one forward and backward pass of 13 prompts × 64 images spends its time in.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from gpu_common import B, DEPTH, DEVICE, DTYPE, M, REHEARSE, SIZE, TOKENS, WIDTH  # isort: skip
from gpu_common import ceilings, keep, network, provenance  # isort: skip

from hgprompt import FrozenViT, fast_ensemble
from hgprompt.encoder import pull_back

N, CLASSES = (24, 3) if REHEARSE else (2000, 10)


def backbone() -> FrozenViT:
    # float16 has too little range for these gradients; a rehearsal on a CPU takes float32.
    return FrozenViT.from_timm(network(), dtype=DTYPE if DEVICE == "cuda" else torch.float32, device=DEVICE)


def whole() -> None:
    vit = backbone()
    labels = torch.arange(N) % CLASSES
    means = torch.randint(40, 216, (CLASSES, 3, 8, 8), dtype=torch.float32)
    means = torch.nn.functional.interpolate(means, size=SIZE, mode="bilinear")
    pixels = torch.empty(N, 3, SIZE, SIZE, dtype=torch.uint8)
    for i in range(N):
        pixels[i] = (means[labels[i]] + 40 * torch.randn(3, SIZE, SIZE)).clamp(0, 255).to(torch.uint8)
    loader = [(pixels[i : i + B], labels[i : i + B]) for i in range(0, N, B)]
    prompts = torch.randn(M, TOKENS, WIDTH)
    record = provenance() | {"ceilings": ceilings(8 * B * (TOKENS + vit.num_image_tokens)), "N": N, "runs": []}
    fast_ensemble(prompts, loader[:2], backbone=vit)  # kernels compiled, buffers made
    for gradient_images in (256, None):
        stages: dict[str, float] = {}

        def note(stage, done, total, stages=stages):
            stages.setdefault(stage, time.perf_counter())

        start = time.perf_counter()
        result = fast_ensemble(prompts, loader, backbone=vit, gradient_images=gradient_images, progress=note)
        end = time.perf_counter()
        begins = [*stages.values(), end]
        record["runs"].append(
            {
                "gradient_images": result.n_gradient_images,
                "seconds": end - start,
                "stages": {name: begins[i + 1] - begins[i] for i, name in enumerate(stages)},
                "gap": result.gap,
                "weights": result.weights.tolist(),
            }
        )
        keep(record)
        print(record["runs"][-1], flush=True)


def profile() -> None:
    from torch.profiler import ProfilerActivity, profile

    vit = backbone()
    images = torch.randn(B, 3, SIZE, SIZE, device=DEVICE, dtype=DTYPE)
    record = provenance() | {"profiles": {}}
    for deep in (False, True):
        prompts = torch.randn((M, DEPTH, TOKENS, WIDTH) if deep else (M, TOKENS, WIDTH), device=DEVICE, dtype=DTYPE)

        def step(prompts=prompts):
            return pull_back(vit, prompts, images, lambda f, m, b: f.square().sum((1, 2)))

        step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
        with profile(activities=activities) as found:
            step()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        key = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
        # An operator's entry repeats the time of the kernels that it launched: on a GPU, kernels alone are counted.
        wanted = torch.autograd.DeviceType.CUDA if DEVICE == "cuda" else torch.autograd.DeviceType.CPU
        events = [e for e in found.key_averages() if e.device_type == wanted and not e.is_user_annotation]
        rows = sorted(events, key=lambda e: -getattr(e, key))[:40]
        table = [{"name": e.key[:160], "calls": e.count, "ms": getattr(e, key) / 1e3} for e in rows]
        record["profiles"]["deep" if deep else "shallow"] = table
        keep(record)
        for row in table[:20]:
            print(f"{row['ms']:9.3f} ms {row['calls']:5} {row['name'][:100]}", flush=True)


if __name__ == "__main__":
    profile() if "--profile" in sys.argv else whole()
