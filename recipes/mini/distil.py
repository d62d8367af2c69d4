"""Distil a CLIP image tower into the mini backbone: a 64-pixel ViT with 8-pixel patches, 192 wide, 8 blocks.

    python recipes/mini/distil.py teach VIEWS CLIP    cache the teacher's features of all views (about 20 minutes)
    python recipes/mini/distil.py learn VIEWS OUT     train the student, export OUT (about an hour on two cores)

CLIP is the tower's weights as timm safetensors (vit_base_patch16_clip_quickgelu_224). The teacher sees a view doubled
to 128 pixels, so that its 8×8 patches lie on the student's. The student learns, by mean squared error, the teacher's
CLS feature and its patch tokens, both centred and rotated to principal axes that are evened out in part (each divided
by the fourth root of its variance); no label is used anywhere. Both stages continue where they were interrupted.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import resample_abs_pos_embed, set_fused_attn
from torch import Tensor, nn
from torch.nn.functional import interpolate

TEACHER = "vit_base_patch16_clip_quickgelu_224"
STUDENT = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 8, "num_heads": 3, "num_classes": 0}
SHARD = 2048
HELD_OUT = 2048
PATCH_AXES = 192
set_fused_attn(False)  # on a CPU, the backward pass of the fused kernel takes twice the time of the plain products
_MEAN = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
_STD = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


def normalised(views: np.ndarray) -> Tensor:
    """uint8 [B, 64, 64, 3] → float [B, 3, 64, 64] as CLIP wants it."""
    return (torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD


def load_teacher(path: Path, size: int) -> nn.Module:
    """The CLIP tower at another input size."""
    model = timm.create_model(TEACHER, num_classes=0, img_size=size)
    state = {k: v for k, v in load_file(path).items() if not k.startswith("head.")}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], list(model.patch_embed.grid_size))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def teach(folder: Path, clip: Path) -> None:
    views = np.load(folder / "views.npy", mmap_mode="r")
    teacher = load_teacher(clip, 128).to(torch.bfloat16)
    axes = folder / "axes.safetensors"
    started = time.monotonic()
    for shard, start in enumerate(range(0, len(views), SHARD)):
        target = folder / f"teacher-{shard:03d}.safetensors"
        if target.exists():
            continue
        cls, patches = [], []
        for batch in np.array_split(views[start : start + SHARD], 32):
            with torch.inference_mode():
                images = interpolate(normalised(batch), size=128, mode="bicubic", antialias=True)
                tokens = teacher.forward_features(images.to(torch.bfloat16)).float()  # type: ignore[operator]
            cls.append(tokens[:, 0])
            patches.append(tokens[:, 1:])
        cls_all, patches_all = torch.cat(cls), torch.cat(patches)
        if not axes.exists():  # the patch tokens' axes come from the first shard: views are in random order
            _write(principal_axes(patches_all.flatten(0, 1)[::4], PATCH_AXES), axes)
        a = load_file(axes)
        reduced = (patches_all - a["mean"]) @ a["axes"] / a["scale"]
        _write({"cls": cls_all, "patches": reduced.to(torch.bfloat16)}, target)
        print(f"teacher: {start + len(cls_all)}/{len(views)}, {time.monotonic() - started:.0f} s", flush=True)


def principal_axes(features: Tensor, count: int) -> dict[str, Tensor]:
    """Mean, leading axes [h, count] and the fourth roots of their variances, scaled to unit mean variance after."""
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((features - mean).double().T))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    scale = values.clamp_min(1e-6 * values[0]) ** 0.25
    scale = scale * (values / scale**2).mean().sqrt()
    return {"mean": mean, "axes": vectors.float().contiguous(), "scale": scale.float()}


class Student(nn.Module):
    """The mini backbone and two linear heads that are thrown away."""

    def __init__(self, cls_axes: int) -> None:
        super().__init__()
        self.vit = timm.models.VisionTransformer(**STUDENT)
        self.to_cls = nn.Linear(STUDENT["embed_dim"], cls_axes)
        self.to_patches = nn.Linear(STUDENT["embed_dim"], PATCH_AXES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit.forward_features(images)
        return self.to_cls(tokens[:, 0]), self.to_patches(tokens[:, 1:])


def learn(folder: Path, out: Path, epochs: int, batch: int, peak: float, patch_weight: float, seed: int) -> None:
    views = np.load(folder / "views.npy")
    shards = [load_file(p) for p in sorted(folder.glob("teacher-*.safetensors"))]
    cls, patches = (torch.cat([s[k] for s in shards]) for k in ("cls", "patches"))
    del shards
    views = views[: len(cls)]
    a = principal_axes(cls[HELD_OUT:], 512)
    cls = (cls - a["mean"]) @ a["axes"] / a["scale"]
    torch.manual_seed(seed)
    student = Student(cls.shape[1])
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=peak, betas=(0.9, 0.98)
    )
    training = len(cls) - HELD_OUT
    steps_per_epoch = training // batch
    total, warm_up = epochs * steps_per_epoch, steps_per_epoch // 2
    checkpoint = folder / "student.pt"
    first = 0
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        student.load_state_dict(kept["student"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["epoch"]
    for epoch in range(first, epochs):
        order = HELD_OUT + np.random.default_rng((seed, epoch)).permutation(training)
        started, sums = time.monotonic(), np.zeros(2)
        student.train()
        for i in range(steps_per_epoch):
            step = epoch * steps_per_epoch + i
            rate = min(1.0, (step + 1) / warm_up) * (0.5 * (1 + math.cos(math.pi * step / total)) + 1e-3)
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            rows = np.sort(order[i * batch : (i + 1) * batch])
            losses = _losses(student, views[rows], cls[rows], patches[rows])
            loss = losses[0] + patch_weight * losses[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            sums += [float(v.detach()) for v in losses]
        student.eval()
        with torch.inference_mode():
            held = [
                [float(v) for v in _losses(student, views[j : j + 256], cls[j : j + 256], patches[j : j + 256])]
                for j in range(0, HELD_OUT, 256)
            ]
        text = ", ".join(f"{v:.4f}" for v in (*sums / steps_per_epoch, *np.mean(held, 0)))
        print(f"epoch {epoch + 1}/{epochs}: train cls, patches, held out cls, patches {text}; "
              f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
        torch.save({"student": student.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1},
                   f"{checkpoint}.tmp")  # fmt: skip
        os.replace(f"{checkpoint}.tmp", checkpoint)
        _write({k: v.half().contiguous() for k, v in student.vit.state_dict().items()}, out)


def _losses(student: nn.Module, views: np.ndarray, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        predicted_cls, predicted_patches = student(normalised(views))
    return (
        (predicted_cls.float() - cls).square().mean(),
        (predicted_patches.float() - patches.float()).square().mean(),
    )


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    first = stages.add_parser("teach")
    first.add_argument("views", type=Path)
    first.add_argument("clip", type=Path)
    second = stages.add_parser("learn")
    second.add_argument("views", type=Path)
    second.add_argument("out", type=Path)
    second.add_argument("--epochs", type=int, default=10)
    second.add_argument("--batch", type=int, default=128)
    second.add_argument("--lr", type=float, default=1.5e-3)
    second.add_argument("--patch-weight", type=float, default=0.5)
    second.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.stage == "teach":
        teach(args.views, args.clip)
    else:
        learn(args.views, args.out, args.epochs, args.batch, args.lr, args.patch_weight, args.seed)


if __name__ == "__main__":
    main()
