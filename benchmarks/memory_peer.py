"""Peak memory of the network beside the loop over prompts with timm: `python benchmarks/memory_peer.py OUT [dtype]`.

ViT-B/16 at 224 pixels, two prompts of 50 tokens, 8 images, forward and backward to the prompts; every case in a process
of its own. *base* is what is resident before the pass (libraries and weights), *peak* the most during it; what packing
the weights took for a moment is in neither. Linux only.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def resident_mb(which: str) -> float:
    """VmRSS: now; VmHWM: the most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:"))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def measure(who: str, dtype_name: str) -> dict[str, float | str]:
    import literal
    import timm
    import torch

    from hgprompt import FrozenViT
    from hgprompt.encoder import pull_back

    dtype = getattr(torch, dtype_name)
    model = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).eval().requires_grad_(False)
    model = model.to(dtype)
    prompts, images = torch.randn(2, 50, 768, dtype=dtype), torch.randn(8, 3, 224, 224, dtype=dtype)
    if who == "ours":
        vit = FrozenViT.from_timm(model)
        del model
        forget_peak()
        base = resident_mb("VmRSS")
        pull_back(vit, prompts, images, lambda f, m, b: f.square().sum((1, 2)))
    else:
        forget_peak()
        base = resident_mb("VmRSS")
        for prompt in prompts:
            leaf = prompt[None].clone().requires_grad_()
            torch.autograd.grad(literal.features(model, leaf, images).square().sum(), leaf)
    return {"who": who, "dtype": dtype_name, "base_MB": base, "peak_MB": resident_mb("VmHWM")}


def main() -> None:
    rows = []
    for dtype in sys.argv[2:] or ("float32", "bfloat16"):
        for who in ("ours", "timm loop"):
            command = [sys.executable, __file__, "--case", who, dtype]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            print("{who:10} {dtype:9} base {base_MB:7.0f} MB  peak {peak_MB:7.0f} MB".format(**rows[-1]), flush=True)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"torch": version("torch"), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] == "--case":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        main()
