"""Which learning rates tune a random prompt on the mini backbone.

python benchmarks/learning_rates.py --suite SUITE --out benchmarks/results/learning-rates.json

160 training images, 20 epochs, three random starts side by side; accuracy on val200 (procedural tasks: 200 other
images), so that no test image takes part in the choice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hgprompt import load_backbone
from hgprompt.bundled import fast_dtype
from hgprompt.data import LabelledImages, decode, load_task, render_task
from hgprompt.files import write_text
from hgprompt.tuning import TuneConfig, random_prompt, tune

# optimiser, prompt lr, head lr, tokens, deep
CASES = (
    ("adamw", 0.0, 0.16, 10, False),
    ("adamw", 0.16, 0.04, 10, False),
    ("adamw", 0.16, 0.16, 10, False),
    ("adamw", 0.64, 0.16, 10, False),
    ("adamw", 2.56, 0.16, 10, False),
    ("adamw", 10.0, 0.16, 10, False),
    ("sgd", 8.0, 1.0, 10, False),
    ("sgd", 64.0, 1.0, 10, False),
    ("adamw", 0.16, 0.16, 10, True),
    ("adamw", 0.64, 0.16, 10, True),
    ("adamw", 2.56, 0.16, 10, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    vit = load_backbone("mini", dtype=fast_dtype("cpu"), device="cpu")
    tasks: dict[str, tuple[LabelledImages, LabelledImages]] = {
        name: (
            decode(load_task(args.suite / name, "train800"), vit.image_size, limit=160, seed=1),
            decode(load_task(args.suite / name, "val200"), vit.image_size),
        )
        for name in ("emoji", "fontid")
    }
    for name in ("object-count", "azimuth"):
        tasks[name] = (render_task(name, 160), render_task(name, 200, split="validation"))
    rows = []
    for optimizer, lr, head_lr, tokens, deep in CASES:
        starts = {f"seed {seed}": random_prompt(vit, tokens, deep=deep, seed=seed) for seed in (42, 44, 82)}
        config = TuneConfig(epochs=20, batch_size=32, optimizer=optimizer, lr=lr, head_lr=head_lr)  # type: ignore[arg-type]
        row = {"optimizer": optimizer, "lr": lr, "head_lr": head_lr, "tokens": tokens, "deep": deep}
        for name, (train, test) in tasks.items():
            last = tune(vit, starts, train, test=test, config=config).history[-1]
            row[name] = {"accuracy": last["test_accuracy"], "loss": last["loss"]}
        rows.append(row)
        means = {name: round(sum(row[name]["accuracy"]) / 3, 3) for name in tasks}
        print(optimizer, lr, head_lr, "deep" if deep else "shallow", means, flush=True)
        write_text(args.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
