"""What docs/choices.md quotes: shrinkage, heads and solvers compared on real tasks.

    python benchmarks/choices.py --suite SUITE --load-clip WEIGHTS/load_clip.py --tasks emoji stamps

For every task: the prompts of the pool tuned on other tasks, 400 training images, 250 test images, bfloat16 network.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from real_task import POOL, load_clip
from scipy.stats import spearmanr

from hgprompt import EnsembleStatistics, FrozenViT, PromptPool, encode, gram_of, h_score, optimize_weights, simplex
from hgprompt.data import load_task, make_loader
from hgprompt.encoder import pull_back
from hgprompt.objective import Alignment, HScore, Objective
from hgprompt.task_loss import FITTED, fit_heads, held_out_logits, inverse_temperatures

FOLDS = 10


@torch.no_grad()
def gather(vit, prompts, folder, split, limit):
    """Images, features [M, N, h] (float32) and labels, in a fixed random order."""
    images, labels = (
        torch.cat(p) for p in zip(*make_loader(load_task(folder, split), vit.image_size, limit=limit), strict=True)
    )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images, encode(vit, prompts, images).float(), labels


def probe(train, labels, test, test_labels) -> float:
    """Test accuracy of a multinomial logistic regression on standardised features (penalty 0.01)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    weight = torch.zeros(train.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(train @ weight + bias, labels) + 0.01 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(((test @ weight + bias).argmax(1) == test_labels).float().mean())


def shrinkage_table(features, labels, test, test_labels):
    statistics = EnsembleStatistics()
    statistics.update(features, labels)
    accuracy = [probe(f, labels, t, test_labels) for f, t in zip(features, test, strict=True)]
    common = HScore(statistics, shrinkage="ledoit-wolf").intensity
    print(f"  probe accuracy of each prompt {np.round(accuracy, 3)}, Ledoit–Wolf on the mixture {common:.3f}")
    choices = {"Ledoit–Wolf per prompt": "ledoit-wolf", "Ledoit–Wolf on the mixture": common}
    choices |= {"OAS on the mixture": HScore(statistics, shrinkage="oas").intensity} | {
        str(a): a for a in (0.001, 0.01, 0.1, 0.3, 0.6)
    }
    for name, shrinkage in choices.items():
        scores = [float(h_score(f, labels, shrinkage=shrinkage)) for f in features]
        line = f"  {name:28} rank correlation {spearmanr(scores, accuracy).statistic:+.2f}"
        line += f", best by H loses {max(accuracy) - accuracy[int(np.argmax(scores))]:.3f}"
        if isinstance(shrinkage, float):
            weights = optimize_weights(statistics, shrinkage=shrinkage).weights.float()
            mixed = [torch.tensordot(weights, f, dims=1) for f in (features, test)]
            line += f", probe on the mixture {probe(mixed[0], labels, mixed[1], test_labels):.3f}"
        print(line, flush=True)
    print(f"  {'uniform':28} probe on the mixture {probe(features.mean(0), labels, test.mean(0), test_labels):.3f}")


def head_table(vit, prompts, images, features, labels):
    """Reproducibility of the gradients: halves of the folds against each other, 20 random splits."""
    statistics = EnsembleStatistics(folds=FOLDS)
    statistics.update(features, labels)
    fold = statistics.fold_of
    grams = {}
    for kind in FITTED:
        start = time.perf_counter()
        heads = fit_heads(kind, statistics, device=vit.device)
        parts = [(features[:, fold == k], labels[fold == k]) for k in range(FOLDS)]
        logits, targets = held_out_logits(heads, [f for f, _ in parts], [y for _, y in parts])
        factor = inverse_temperatures(logits, targets)
        before, after = (F.cross_entropy((t[:, None, None] * logits).flatten(0, 1), targets.repeat(len(logits)))
                         for t in (torch.ones_like(factor), factor))  # fmt: skip
        gradients = []
        for k in range(FOLDS):
            x, y, head = images[fold == k], labels[fold == k], heads[k].sharpened(factor)
            gradients.append(
                pull_back(vit, prompts, x, lambda f, m, b, y=y, head=head: head.loss(f, y[b], m))[2].flatten(1)
            )
        stacked = torch.stack(gradients)
        agreement, gram_agreement = [], []
        for seed in range(20):
            order = torch.randperm(FOLDS, generator=torch.Generator().manual_seed(seed))
            halves = [F.normalize(stacked[part].sum(0), dim=1) for part in order.chunk(2)]
            agreement.append(float((halves[0] * halves[1]).sum(1).mean()))
            upper = torch.triu_indices(len(prompts), len(prompts), 1)
            gram_agreement.append(
                float(torch.corrcoef(torch.stack([(g @ g.T)[upper[0], upper[1]] for g in halves]))[0, 1])
            )
        print(
            f"  {kind:11} cross-entropy {before:6.2f}, at its temperature {after:5.2f}; cosine of halves' gradients "
            f"{np.mean(agreement):+.2f}, correlation of their Gram matrices {np.mean(gram_agreement):+.2f} "
            f"({time.perf_counter() - start:.0f} s)", flush=True,
        )  # fmt: skip
        grams[kind] = gram_of(stacked.sum(0))
    return statistics, grams["shared-lda"]


def solver_table(statistics, gram):
    size = statistics.num_prompts
    start = np.full(size, 1 / size)

    def fixed_step(function, rate, steps):
        return simplex.projected_gradient(function, start, learning_rate=rate, steps=steps, tolerance=1e-6)

    for lam in (0.0, 0.1, 1.0):
        objective = Objective(HScore(statistics), Alignment(gram.numpy()), lam)
        solvers = {
            "quasi-newton": lambda f: simplex.quasi_newton(f, start),
            "exponentiated-gradient": lambda f: simplex.exponentiated_gradient(f, start),
            "projected-gradient 0.5": lambda f: fixed_step(f, 0.5, 2000),
            "projected-gradient 0.005": lambda f: fixed_step(f, 0.005, 1000),
        }  # fmt: skip
        for name, solve in solvers.items():
            found = solve(objective)
            print(
                f"  λ {lam:3} {name:25} {found.evaluations:5} evaluations, gap {found.gap:.0e}, value {found.value:.6f}"
            )
        values = [simplex.quasi_newton(objective, p).value for p in simplex.starting_points(objective, size, 8, 0)]
        print(f"  λ {lam:3} eight starts end between {min(values):.6f} and {max(values):.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--load-clip", type=Path, required=True)
    parser.add_argument(
        "--tasks", nargs="+", default=["emoji", "fontid", "stamps", "clipart", "letters", "textile", "fashion", "mnist"]
    )
    parser.add_argument("--only", choices=["shrinkage", "heads"], help="leave the other part out")
    arguments = parser.parse_args()
    vit = FrozenViT.from_timm(load_clip(arguments.load_clip, 112), dtype=torch.bfloat16)
    for task in arguments.tasks:
        pool = PromptPool.load(POOL).without(task)
        images, features, labels = gather(vit, pool.stack(), arguments.suite / task, "train800", 400)
        print(f"{task}: {len(labels)} images, {len(labels.unique())} classes, prompts {', '.join(pool.names)}")
        if arguments.only != "heads":
            _, test, test_labels = gather(vit, pool.stack(), arguments.suite / task, "test", 250)
            shrinkage_table(features, labels, test, test_labels)
        if arguments.only != "shrinkage":
            solver_table(*head_table(vit, pool.stack(), images, features, labels))


if __name__ == "__main__":
    main()
