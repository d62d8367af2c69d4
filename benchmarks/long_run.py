"""Memory over a long pass, and what checkpoints cost: `python benchmarks/long_run.py [out.json]`.

100,000 synthetic images go the whole road of fast_ensemble through a very small ViT: what is measured is whether
anything grows with N, not the network. Moments are kept, and memory is the process's resident set, every 1,000 images.
Each pass runs in a process of its own. Beside it: time for the digest of an image of 224 x 224, and for a checkpoint.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

IMAGES, BATCH, M, CLASSES = 100_000, 50, 4, 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stream(num_images: int):
    import torch

    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    for _ in range(num_images // BATCH):
        labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield torch.randn(BATCH, 3, 16, 16, generator=generator) + colours[labels], labels


def long_pass(checkpoints: bool) -> dict:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    import hgprompt
    from hgprompt.checkpoint import PassCheckpoint

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    prompts = torch.randn(M, 4, 32)
    rows: list[tuple[int, int]] = []
    writes: list[float] = []
    write = PassCheckpoint.write

    def timed(self, gathering):
        begin = time.perf_counter()
        written = write(self, gathering)
        writes.append(time.perf_counter() - begin)
        return written

    PassCheckpoint.write = timed  # type: ignore[method-assign]

    def report(stage: str, done: int, total: int | None) -> None:
        if stage == "images" and done * BATCH % 1000 == 0:
            rows.append((done * BATCH, resident_bytes()))

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = hgprompt.fast_ensemble(
            prompts, stream(IMAGES), backbone=model, keep="moments", progress=report,
            checkpoint_dir=folder if checkpoints else None, checkpoint_every=1.0,
        )  # fmt: skip
    seconds = time.perf_counter() - begin
    settled = [size for n, size in rows if n >= 10_000]
    return {
        "checkpoints": len(writes), "seconds": round(seconds, 1), "images_per_second": round(IMAGES / seconds),
        "share_of_time_in_checkpoints": round(sum(writes) / seconds, 4), "kept_MB": round(result.kept_bytes / 1e6, 2),
        "growth_from_10000_images_on_kB": (settled[-1] - settled[0]) // 1024,
        "largest_less_smallest_from_10000_images_on_kB": (max(settled) - min(settled)) // 1024,
        "images": [n for n, _ in rows], "resident_MB": [round(size / 1e6, 2) for _, size in rows],
    }  # fmt: skip


def cost_of_checkpoints() -> dict:
    """Median times on one thread: the digest of an image, and writing and reading a file with moments of 1 GB."""
    import torch

    from hgprompt.checkpoint import PassCheckpoint
    from hgprompt.files import read_safetensors, write_safetensors

    torch.set_num_threads(1)
    batches = [(torch.randn(32, 3, 224, 224), torch.arange(32)) for _ in range(4)]  # beyond the caches
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = PassCheckpoint(folder, {})
        times = []
        for _ in range(20):
            for images, labels in batches:
                begin = time.perf_counter()
                checkpoint.note(images, labels)
                times.append((time.perf_counter() - begin) / 32)
        extra = 0
        rows = torch.randn(125_000_000, dtype=torch.float64)
        path = Path(folder) / "x.safetensors"
        writing, reading, resident = [], [], peak_bytes()
        for _ in range(3):
            begin = time.perf_counter()
            write_safetensors(path, {"rows": rows}, {}, checksum=True)
            writing.append(time.perf_counter() - begin)
            extra = peak_bytes() - resident if len(writing) == 1 else extra
            begin = time.perf_counter()
            read_safetensors(path, checksum=True)[0]["rows"].clone()
            reading.append(time.perf_counter() - begin)
    return {
        "digest_microseconds_per_image_224px_float32": round(1e6 * statistics.median(times), 1),
        "write_1_GB_extra_memory_MB": round(extra / 1e6, 1),
        "write_1_GB_seconds": round(statistics.median(writing), 2),
        "read_1_GB_seconds": round(statistics.median(reading), 2),
    }


def main() -> None:
    record: dict = {"torch": version("torch"), "threads": 1, "N": IMAGES, "M": M, "batch": BATCH}
    for case in ("plain", "checkpoints", "costs"):
        output = subprocess.run([sys.executable, __file__, "--case", case], check=True, stdout=subprocess.PIPE)
        record[case] = json.loads(output.stdout)
        print(case, {k: v for k, v in record[case].items() if not isinstance(v, list)}, flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--case":
        case = sys.argv[2]
        print(json.dumps(cost_of_checkpoints() if case == "costs" else long_pass(case == "checkpoints")))
    else:
        main()
