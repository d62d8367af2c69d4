"""Peak memory of fast_ensemble as N and M grow at a fixed micro-batch: `python benchmarks/memory.py [out.json]`.

Each case runs in a process of its own; the peak is the operating system's (maximum resident set). Beside it stand the
bytes that the pass keeps on purpose: statistics, the gradient sample and the gradients.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.metadata import version

CASES = [(4, 64), (4, 128), (4, 256), (4, 512), (2, 128), (8, 128)]


def measure(m: int, n: int) -> dict[str, float]:
    """One run: M prompts, N images of 112 × 112 through a ViT-S/16 in float32."""
    import timm
    import torch

    import hgprompt

    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0, img_size=112).eval()
    vit = hgprompt.FrozenViT.from_timm(model)
    prompts = torch.randn(m, 10, 384)

    def stream(images):
        for i in range(0, images, 16):
            labels = torch.arange(i, i + 16) % 4
            yield torch.randn(16, 3, 112, 112) + labels[:, None, None, None], labels

    hgprompt.fast_ensemble(prompts[:2], stream(32), backbone=vit, micro_batch=16)  # libraries loaded, buffers touched
    result = hgprompt.fast_ensemble(prompts, stream(n), backbone=vit, micro_batch=16)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"M": m, "N": n, "peak_MB": peak / 1e6, "kept_MB": result.kept_bytes / 1e6}


def main() -> None:
    rows = []
    for m, n in CASES:
        output = subprocess.run([sys.executable, __file__, "--case", str(m), str(n)], check=True, capture_output=True)
        rows.append(json.loads(output.stdout))
        print("M {M:3d}  N {N:4d}  peak {peak_MB:7.1f} MB  kept {kept_MB:6.1f} MB".format(**rows[-1]), flush=True)
    if len(sys.argv) > 1:
        record = {"model": "vit_small_patch16_224, 112 px, float32, p=10", "torch": version("torch"), "rows": rows}
        with open(sys.argv[1], "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--case":
        print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
