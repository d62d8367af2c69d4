"""encode on a GPU beside timm: python benchmarks/gpu_encode.py out.json [--compiled] [--rehearse]

ViT-B/16, 224 pixels, p = 50, M = 13, bfloat16; forward, and forward with the backward to the prompts; shallow and deep.
Peers run timm's own modules on the same images, and are checked to give the same features: a loop over prompts (eager),
prompts batched with the images (eager, with PyTorch's choice of attention and with cuDNN's), and with --compiled the
same with each block under torch.compile (max-autotune). A batched peer takes all prompts and a quarter of the images at
a time.

"useful" counts the floating-point operations that have to be done (the exact savings taken off), "naive" those of the
plain loop; both stand beside the rate of the library's products, measured in the same run at the network's shapes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import literal

from flops import BACKWARD, Network  # isort: skip
from gpu_common import B, DEPTH, DEVICE, DTYPE, M, REHEARSE, SIZE, TOKENS, WIDTH  # isort: skip
from gpu_common import ceilings, difference, end_if_lost, host_ms, keep, median_ms  # isort: skip
from gpu_common import network, peak_gigabytes, provenance  # isort: skip

from hgprompt import FrozenViT, encode, operations
from hgprompt.encoder import MicroBatch, pull_back
from hgprompt.kernels import linear, mlp

COMPILED = "--compiled" in sys.argv
IMAGES_AT_ONCE = 1 if REHEARSE else 16  # of a batched peer: with 13 prompts it keeps about 10 GB


def batched(model, blocks, prompts, images):
    """timm's modules on all (prompt, image) pairs at once → [m, B, h]; blocks: the model's own, or compiled."""
    deep, m, b = prompts.ndim == 4, len(prompts), len(images)
    x = model._pos_embed(model.patch_embed(images)).repeat(m, 1, 1)
    of = functools.partial(torch.repeat_interleave, repeats=b, dim=0)
    p = prompts.shape[-2]
    x = model.norm_pre(torch.cat([x[:, :1], of(prompts[:, 0] if deep else prompts), x[:, 1:]], dim=1))
    for i, block in enumerate(blocks):
        if deep and i > 0:
            x = torch.cat([x[:, :1], of(prompts[:, i]), x[:, 1 + p :]], dim=1)
        x = block(x)
    return model.forward_head(model.norm(x), pre_logits=True).unflatten(0, (m, b))


def peers(model):
    """{name: (function of prompts and images → features, prompts at once, images at once, context)}"""
    cudnn = functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
    if COMPILED:  # block by block: the same code twelve times is compiled once
        torch._dynamo.config.cache_size_limit = 64
        blocks = [torch.compile(block, mode="max-autotune-no-cudagraphs") for block in model.blocks]
        found = {"timm batched, compiled": (functools.partial(batched, model, blocks), M, IMAGES_AT_ONCE)}
    else:
        many = functools.partial(batched, model, model.blocks)
        found = {
            "timm loop": (functools.partial(literal.features, model), 1, B),
            "timm batched": (many, M, IMAGES_AT_ONCE),
        }
    last = list(found)[-1]
    if DEVICE == "cuda":
        found[f"{last}, cuDNN"] = found[last]
    return {name: (*rest, cudnn if "cuDNN" in name else contextlib.nullcontext) for name, rest in found.items()}


def variants():
    """Ours: what runs by default, and with one thing changed."""
    found = {
        "triton": ("triton", operations.TRITON),
        "triton, sdpa attention": ("sdpa", operations.TRITON),
        "reference": ("reference", operations.TRITON),
    }
    if linear.available(torch.empty(0, device=DEVICE, dtype=DTYPE), WIDTH):  # of sm_90
        fused = dataclasses.replace(operations.TRITON, mlp=functools.partial(mlp.mlp, form="fused"))
        found["triton, fused MLP"] = ("triton", fused)
    return found


def main() -> None:
    model = network().to(DEVICE, DTYPE)
    vit = FrozenViT.from_timm(model)
    images = torch.randn(B, 3, SIZE, SIZE, device=DEVICE, dtype=DTYPE)
    direction = torch.randn(B, WIDTH, device=DEVICE, dtype=DTYPE)
    record = provenance() | {"ceilings": ceilings(8 * B * (TOKENS + vit.num_image_tokens)), "cases": []}
    print(record["ceilings"], flush=True)
    for deep in (False, True):
        prompts = torch.randn((M, DEPTH, TOKENS, WIDTH) if deep else (M, TOKENS, WIDTH), device=DEVICE, dtype=DTYPE)
        # One prompt at a time, as it is tuned: so little work that the host may be what takes time.
        for some in (prompts,) if COMPILED else (prompts, prompts[:1]):
            for kind in ("both", "forward"):
                case = measure(model, vit, images, some, direction, kind, deep, record)
                keep(record)
                print(json.dumps(case, indent=1), flush=True)


def measure(model, vit, images, prompts, direction, kind, deep, record) -> dict:
    work = Network(WIDTH, DEPTH, vit.num_image_tokens, TOKENS, deep)
    pairs = len(prompts) * B * (1 if kind == "forward" else 1 + BACKWARD)
    useful, naive = (pairs * work.forward(useful=which) / 1e9 for which in (True, False))
    case: dict = {"prompts": "deep" if deep else "shallow", "M": len(prompts), "kind": kind, "ours": {}, "peers": {}}
    record["cases"].append(case)

    suitable = MicroBatch()  # of all calls, as in a pass: the driver is asked for memory once

    def ours(impl):
        if kind == "forward":
            with torch.no_grad():
                return encode(vit, prompts, images, impl=impl, micro_batch=suitable)
        return pull_back(
            vit, prompts, images, lambda f, m, b: (f * direction[b]).sum((1, 2)), impl=impl, micro_batch=suitable
        )[2]

    def theirs(peer, prompts_at_once, images_at_once):
        """All prompts and images in chunks of one shape: features, or gradients summed over the images."""
        rows = []
        for part in prompts.split(prompts_at_once):
            chunks = []
            for x, d in zip(images.split(images_at_once), direction.split(images_at_once), strict=True):
                if kind == "forward":
                    with torch.no_grad():
                        chunks.append(peer(part, x).clone())
                else:
                    leaf = part.clone().requires_grad_()
                    chunks.append(torch.autograd.grad((peer(leaf, x) * d).sum(), leaf)[0].clone())
            rows.append(torch.cat(chunks, dim=1) if kind == "forward" else sum(chunks))
        return torch.cat(rows)

    def time_ours(name, impl, ops):
        kept, operations.TRITON = operations.TRITON, ops
        found = None
        try:
            found = ours(impl)
            ms = median_ms(functools.partial(ours, impl), rounds=10)
            case["ours"][name] = {"ms": ms, "useful TFLOP/s": useful / ms, "naive TFLOP/s": naive / ms}
            case["ours"][name]["host ms"] = host_ms(functools.partial(ours, impl))
            case["ours"][name]["peak GB"] = peak_gigabytes(functools.partial(ours, impl))
            if result is not None:
                case["ours"][name]["difference from triton"] = difference(found, result)
        except Exception as error:  # one variant that does not run must not lose the others' figures
            case["ours"][name] = {"failed": f"{error!r:.300}"}
            keep(record)
            end_if_lost(error)
        operations.TRITON = kept
        keep(record)
        return found

    (first, *own), *others = [(name, *how) for name, how in variants().items()]
    result = None
    result = time_ours(first, *own)
    best = case["ours"].get("triton", {}).get("ms")
    for name, (peer, prompts_at_once, images_at_once, context) in peers(model).items():
        if COMPILED:
            torch._dynamo.reset()  # else one runs the other's code: attention's backend is no part of its guards
        try:
            with context():
                expected = theirs(peer, prompts_at_once, images_at_once)
                ms = median_ms(functools.partial(theirs, peer, prompts_at_once, images_at_once), rounds=10)
                host = host_ms(functools.partial(theirs, peer, prompts_at_once, images_at_once))
            case["peers"][name] = {"ms": ms, "host ms": host, "ratio": ms / best if best else None}
            if result is not None:
                case["peers"][name]["relative_difference"] = difference(result, expected)
        except Exception as error:
            case["peers"][name] = {"failed": f"{error!r:.300}"}
            keep(record)
            end_if_lost(error)
        keep(record)
    for name, impl, ops in () if COMPILED else others:  # after the peers: the least tried form stands last
        time_ours(name, impl, ops)
    return case


if __name__ == "__main__":
    main()
