"""What the mini backbone's features are worth: a linear probe on every task of a suite, beside its teacher's.

    python recipes/mini/probe.py SUITE --clip CLIP --out OUT.json

For each task a logistic regression on frozen CLS features is fitted to train800, its L2 penalty chosen on val200, then
fitted again to both and scored on test. Compared: the mini backbone; the same architecture with random weights; CLIP
ViT-B/16 on the very same 64-pixel images (enlarged to 128, its patches then lie on the mini's); and CLIP at 224 pixels
on the original files.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

sys.path.insert(0, str(Path(__file__).parent))
from distil import load_teacher

from hgprompt.bundled import mini_model
from hgprompt.data import LabelledImages, decode, load_task

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--clip", type=Path, required=True, help="CLIP's tower as timm safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--own-size", action="store_true", help="CLIP at 224 pixels too (slow on a CPU)")
    args = parser.parse_args()
    torch.manual_seed(0)
    networks: dict[str, tuple[nn.Module, int, int]] = {  # model, pixels read from the file, pixels it sees
        "mini": (mini_model(), 64, 64),
        "untrained": (mini_model(pretrained=False), 64, 64),
        "CLIP, same 64 pixels": (load_teacher(args.clip, 128).to(torch.bfloat16), 64, 128),
    }
    if args.own_size:
        networks["CLIP, 224 pixels"] = (load_teacher(args.clip, 224).to(torch.bfloat16), 224, 224)
    record: dict[str, dict[str, float]] = {}
    for task in sorted(p for p in args.suite.iterdir() if (p / "train800.txt").is_file()):
        record[task.name] = {}
        for name, (model, read, seen) in networks.items():
            parts = [_features(model, _load(task, split, read), seen) for split in ("train800", "val200", "test")]
            record[task.name][name] = _probe(*parts)
        print(task.name, {k: round(v, 3) for k, v in record[task.name].items()}, flush=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    args.out.write_text(json.dumps({"test_accuracy": record, "versions": versions}, indent=1) + "\n")


def _load(task: Path, split: str, pixels: int) -> LabelledImages:
    return decode(load_task(task, split), (pixels, pixels))


@torch.inference_mode()
def _features(model: nn.Module, images: LabelledImages, seen: int) -> tuple[Tensor, Tensor]:
    config = mini_model(pretrained=False).pretrained_cfg  # CLIP's mean and standard deviation: the mini's teacher's
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    dtype = next(model.parameters()).dtype
    rows = []
    for batch, _ in images.batches(64):
        pixels = (batch.float() / 255 - mean) / std
        if pixels.shape[-1] != seen:
            pixels = interpolate(pixels, size=seen, mode="bicubic", antialias=True)
        rows.append(model.forward_features(pixels.to(dtype))[:, 0].float())  # type: ignore[operator]
    return torch.cat(rows), images.labels


def _probe(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    scores = [_score(*_fit(*train, penalty), *val) for penalty in PENALTIES]
    penalty = PENALTIES[scores.index(max(scores))]
    both = (torch.cat([train[0], val[0]]), torch.cat([train[1], val[1]]))
    return _score(*_fit(*both, penalty), *test)


def _fit(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [h + 1, C] of a logistic regression on standardised features, and their mean and scale [2, h]."""
    scale = torch.stack([features.mean(0), features.std(0) + 1e-6]).double()
    x = _standardised(features, scale)
    weight = torch.zeros(x.shape[1], int(labels.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(x @ weight, labels) + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), scale


def _score(weight: Tensor, scale: Tensor, features: Tensor, labels: Tensor) -> float:
    return float(((_standardised(features, scale) @ weight).argmax(1) == labels).double().mean())


def _standardised(features: Tensor, scale: Tensor) -> Tensor:
    x = (features.double() - scale[0]) / scale[1]
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


if __name__ == "__main__":
    main()
