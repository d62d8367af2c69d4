"""encode on a GPU beside timm: python benchmarks/gpu_encode.py out.json [--rehearse]

ViT-B/16, 224 pixels, p = 50, M = 13, bfloat16; forward, and forward with the backward to the prompts; shallow and deep.
Peers at equal batch: timm eager, a loop over prompts; and the same loop compiled (max-autotune). Times are medians by
CUDA events after a warm-up. "useful" counts the floating point operations that have to be done (exact savings taken
off), "naive" those of the plain loop; both stand beside the GEMM rate measured in the same run at the network's shapes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import literal

from hgprompt import FrozenViT, encode
from hgprompt.encoder import pull_back

REHEARSE = "--rehearse" in sys.argv
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, TOKENS, M, B, DEPTH = (32, 5, 2, 2, 2) if REHEARSE else (224, 50, 13, 64, 12)
WIDTH = 768


def median_seconds(function, rounds=3 if REHEARSE else 10):
    """Median time of a call, on the device's own clock where it has one."""
    for _ in range(1 if REHEARSE else 3):
        function()
    times = []
    for _ in range(rounds):
        if DEVICE == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def flops(tokens: int, image_tokens: int, deep: bool, useful: bool) -> float:
    """Forward operations of one image under one prompt; a multiply-add is two."""
    linear = 2 * 12 * WIDTH * WIDTH  # QKV, projection and MLP, per token and block
    total = tokens + image_tokens
    if not useful:
        return DEPTH * (linear * total + 4 * total * total * WIDTH)
    rows = image_tokens if deep else total  # tokens that go through the linear layers
    middle = (DEPTH - 2) * (linear * rows + 4 * rows * total * WIDTH)
    first = linear * rows * 0.75 + 4 * rows * total * WIDTH  # QKV, a quarter of the linear work, is shared
    last = linear / 6 * rows + linear * 5 / 6 + 4 * total * WIDTH  # K and V on all tokens, the rest on one
    return middle + first + last


def gemm_rates(dtype) -> dict[str, float]:
    """TFLOP/s of torch's own GEMM at the network's four shapes."""
    rows = 64 if REHEARSE else B * 247
    rates = {}
    for name, (k, n) in {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}.items():
        a, w = torch.randn(rows, k, device=DEVICE, dtype=dtype), torch.randn(n, k, device=DEVICE, dtype=dtype)
        rates[name] = 2 * rows * k * n / median_seconds(lambda a=a, w=w: torch.nn.functional.linear(a, w)) / 1e12
    return rates


def main() -> None:
    dtype = torch.bfloat16
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0, img_size=SIZE, depth=DEPTH)
    model = model.eval().requires_grad_(False).to(DEVICE, dtype)
    vit = FrozenViT.from_timm(model)
    images = torch.randn(B, 3, SIZE, SIZE, device=DEVICE, dtype=dtype)
    direction = torch.randn(B, WIDTH, device=DEVICE, dtype=dtype)
    image_tokens = vit.num_image_tokens
    record = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "torch": version("torch"), "timm": version("timm"), "cuda": torch.version.cuda,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "shapes": {"M": M, "B": B, "p": TOKENS, "image": SIZE, "depth": DEPTH},
        "gemm_tflops": gemm_rates(dtype), "cases": [],
    }  # fmt: skip
    for deep in (False, True):
        prompts = torch.randn((M, DEPTH, TOKENS, WIDTH) if deep else (M, TOKENS, WIDTH), device=DEVICE, dtype=dtype)

        def eager(prompt):
            return literal.features(model, prompt[None], images)[0]

        peers = {"timm eager loop": eager}
        if DEVICE == "cuda":
            peers["timm compiled loop"] = torch.compile(eager, mode="max-autotune")

        def ours_forward(prompts=prompts):
            with torch.no_grad():
                return encode(vit, prompts, images)

        def ours_backward(prompts=prompts):
            return pull_back(vit, prompts, images, lambda f, m, b: (f * direction[b]).sum((1, 2)))[2]

        def forward(peer, prompts=prompts):
            with torch.no_grad():
                return [peer(prompt).clone() for prompt in prompts]

        def backward(peer, prompts=prompts):
            gradients = []
            for prompt in prompts:
                leaf = prompt.clone().requires_grad_()
                gradients.append(torch.autograd.grad((peer(leaf) * direction).sum(), leaf)[0].clone())
            return gradients

        for kind, ours, theirs, factor in (
            ("forward", ours_forward, forward, 1),
            ("both", ours_backward, backward, 2.08),
        ):
            seconds = median_seconds(ours)
            pairs = M * B * factor
            case = {"deep": deep, "kind": kind, "seconds": seconds}
            case["useful_tflops"] = pairs * flops(TOKENS, image_tokens, deep, True) / seconds / 1e12
            case["naive_tflops"] = pairs * flops(TOKENS, image_tokens, deep, False) / seconds / 1e12
            for name, peer in peers.items():
                try:
                    result = torch.stack(theirs(peer)).double()
                    case[f"{name}: relative difference"] = float((ours().double() - result).norm() / result.norm())
                    case[f"{name}: seconds"] = median_seconds(lambda theirs=theirs, peer=peer: theirs(peer))
                    case[f"{name}: ratio"] = case[f"{name}: seconds"] / seconds
                except Exception as error:  # a peer that does not run must not lose the others' figures
                    case[f"{name}: error"] = f"{type(error).__name__}: {error}"[:300]
            record["cases"].append(case)
            print(json.dumps(case), flush=True)
            partial = Path(sys.argv[1] + ".tmp")
            partial.write_text(json.dumps(record, indent=1))
            partial.replace(sys.argv[1])


if __name__ == "__main__":
    main()
