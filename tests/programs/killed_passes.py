"""Kill passes at random moments, let them go on, and compare: `killed_passes.py FOLDER KIND=KILLS ...`.

One process imports everything and forks the passes that are killed: importing PyTorch for each would take minutes. It
has one thread, as it must to fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import literal
import torch

import hgprompt
from hgprompt.errors import HGPromptError

BATCHES, BATCH, CLASSES = 24, 6, 3
OPTIONS = {
    "features": {"keep": "features"},
    "moments": {"keep": "moments", "gradient_images": 16},
    "own head": {"keep": "features"},
    "tolerance": {"tolerance": 1e-9},
}


def run(kind: str, folder: str | None) -> hgprompt.EnsembleResult:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (BATCHES * BATCH,), generator=g)
    images = torch.randn(len(labels), 3, 16, 16, generator=g) + torch.randn(CLASSES, 3, 1, 1, generator=g)[labels]
    prompts = torch.randn(3, 2, 16, generator=g)
    head = torch.nn.Linear(16, CLASSES)
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, 16, generator=g))
        head.bias.zero_()
    options = OPTIONS[kind] | ({"head": head} if kind == "own head" else {})

    def loader():
        for i in range(0, len(labels), BATCH):
            yield images[i : i + BATCH], labels[i : i + BATCH]

    return hgprompt.fast_ensemble(
        prompts, loader(), backbone=literal.tiny_vit(), starts=1, max_steps=5, folds=3,
        checkpoint_dir=folder, checkpoint_every=0.0, **options,
    )  # fmt: skip


def answer(result: hgprompt.EnsembleResult) -> list[str]:
    """All bits of what a user sees."""
    values = [*result.weights.tolist(), *result.prompt.flatten().tolist(), *result.weight_std.tolist()]
    values += [result.h_score, result.alignment_loss, *result.gradient_cosines.flatten().tolist()]
    return [float(v).hex() for v in values] + [str(result.n_images), str(result.n_gradient_images)]


def child(kind: str, folder: str, out: Path) -> int:
    """The process id of a pass on its own; it writes its answer whole, or its error."""
    pid = os.fork()
    if pid:
        return pid
    import hgprompt.checkpoint as checkpoint

    checkpoint.SHARE = 1e9  # a checkpoint after every batch: half of all kills fall into one
    try:
        text = json.dumps(answer(run(kind, folder)))
    except HGPromptError as error:
        text = json.dumps({"error": str(error)})
    part = out.with_suffix(".part")
    part.write_text(text)
    part.rename(out)
    os._exit(0)


def kill_and_resume(kind: str, kills: int, folder: Path) -> dict[str, int | float]:
    """Counts of what happened; AssertionError where an answer is not that of the undisturbed pass."""
    out = folder / "answer"
    run(kind, None)  # all that is imported late is imported before the clock runs
    begin = time.monotonic()
    expected, seconds = answer(run(kind, None)), time.monotonic() - begin
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    chance = random.Random(0)
    found = {"kills": 0, "finished": 0, "in a write": 0, "with a checkpoint": 0, "seconds undisturbed": seconds}
    since_finished = 0
    while found["kills"] < kills or since_finished:
        place = folder / f"pass-{found['finished']}"
        pid = child(kind, str(place), out)
        if since_finished < 6 and found["kills"] < kills:
            time.sleep(chance.uniform(0.0, 0.8 * seconds))
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if out.exists():  # let go on to its end after six kills, or faster than the next one
            assert json.loads(out.read_text()) == expected, (kind, out.read_text())
            assert not any(place.iterdir()), "a finished pass leaves nothing behind"
            out.unlink()
            found["finished"] += 1
            since_finished = 0
            continue
        left = [p.name for p in place.iterdir()] if place.exists() else []
        found["in a write"] += any(name.endswith(".tmp") for name in left)
        found["with a checkpoint"] += "pass.safetensors" in left
        found["kills"] += 1
        since_finished += 1
    return found


def main() -> None:
    place = Path(sys.argv[1])
    found = {}
    for wanted in sys.argv[2:]:
        kind, _, kills = wanted.partition("=")
        (place / kind).mkdir()
        found[kind] = kill_and_resume(kind, int(kills), place / kind)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
