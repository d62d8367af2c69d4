"""compare_starts: every start is tuned as `tune` alone would tune it, from the prompt that its name says."""

from __future__ import annotations

import dataclasses

import literal
import pytest
import torch

from hgprompt import FrozenViT, OptionError, PromptPool, fast_ensemble
from hgprompt.data import LabelledImages
from hgprompt.plots import plot_comparison
from hgprompt.tuning import TuneConfig, compare_starts, random_prompt, tune

CONFIG = TuneConfig(batch_size=8, lr=2.0, head_lr=4.0)


@pytest.fixture(scope="module")
def vit():
    return FrozenViT.from_timm(literal.tiny_vit())


@pytest.fixture(scope="module")
def pool(vit):
    return PromptPool({f"p{i}": random_prompt(vit, 2, seed=10 + i) * (i + 1) for i in range(3)}, backbone=vit.info)


def _draw(seed, n=24):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.randint(0, 100, (n, 3, 16, 16), generator=g) + 50 * labels.view(-1, 1, 1, 1)
    return LabelledImages("set", pixels.to(torch.uint8), labels)


def test_is_tuning_from_each_start(vit, pool, tmp_path):
    test = _draw(99)
    options = {"gradient_images": 12, "folds": 4}
    comparison = compare_starts(
        vit, pool, _draw, test, seeds=(1, 2), epochs=(1, 3), config=CONFIG, variants=(0.0,), ensemble_options=options
    )
    assert comparison.starts == ("random", "best single by H", "uniform", "HGPrompt", "HGPrompt λ=0")
    assert comparison.accuracy.shape == (2, 2, 5)
    assert comparison.curves.shape == (3, 2, 5)
    assert torch.equal(comparison.curves[-1], comparison.accuracy[1])
    assert comparison.curve_epochs == (1, 2, 3)
    for s, seed in enumerate((1, 2)):
        images = _draw(seed)
        result = fast_ensemble(pool, images.batches(64), backbone=vit, seed=seed, **options)
        assert torch.equal(result.weights, comparison.ensembles[s].weights)
        single = max(zip(result.source_h_scores.tolist(), result.names, strict=True))[1]
        assert comparison.singles[s] == single
        mixed = sum(w * pool[n] for w, n in zip(result.weights.tolist(), pool, strict=True))
        without = fast_ensemble(pool, images.batches(64), backbone=vit, seed=seed, lam=0.0, **options)
        starts = (
            random_prompt(vit, 2, seed=seed), pool[single], (pool["p0"] + pool["p1"] + pool["p2"]) / 3, mixed,
            without.prompt,
        )  # fmt: skip
        for e, epochs in enumerate((1, 3)):
            config = dataclasses.replace(CONFIG, epochs=epochs, seed=seed)
            for k, start in enumerate(starts):
                alone = tune(vit, {"alone": start}, images, test=test, config=config)
                # Accuracies move in steps of 1/24: one image may lie on the edge between two classes.
                assert comparison.accuracy[e, s, k] == pytest.approx(alone.accuracy("alone"), abs=1.01 / 24)
    record = comparison.record()
    assert record["accuracy"] == comparison.accuracy.tolist()
    assert sum(record["weights"][0].values()) == pytest.approx(1)
    plot_comparison(comparison, "title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_goes_on_from_checkpoints(vit, pool, tmp_path, monkeypatch):
    options = {"seeds": (1,), "epochs": (4,), "config": CONFIG, "ensemble_options": {"gradient_images": 12, "folds": 4}}
    undisturbed = compare_starts(vit, pool, _draw, _draw(99), **options)

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage.startswith("seed") and done == 8:
            raise Stop

    with pytest.raises(Stop):
        compare_starts(vit, pool, _draw, _draw(99), folder=tmp_path, progress=stop, **options)
    assert len(list(tmp_path.iterdir())) == 2  # the ensemble, and the tuning

    def other_bits(*args, **options):  # as another number of threads has them: the checkpoint would be refused
        result = fast_ensemble(*args, **options)
        return dataclasses.replace(result, prompt=result.prompt * (1 + 1e-6))

    with monkeypatch.context() as patch:
        patch.setattr("hgprompt.tuning.compare.fast_ensemble", other_bits)
        resumed = compare_starts(vit, pool, _draw, _draw(99), folder=tmp_path, **options)
    assert torch.equal(resumed.curves, undisturbed.curves)
    assert resumed.record() == undisturbed.record() | {"seconds": list(resumed.seconds)}


@pytest.mark.parametrize("other", ["images", "pool", "λ"])
def test_an_ensemble_of_something_else_is_not_taken(vit, pool, tmp_path, other):
    options = {"seeds": (1,), "epochs": (1,), "config": CONFIG, "ensemble_options": {"gradient_images": 12, "folds": 4}}
    compare_starts(vit, pool, _draw, _draw(99), folder=tmp_path / "kept", **options)
    for file in (tmp_path / "kept").glob("*.checkpoint.safetensors"):
        file.unlink()  # a tuning refuses other images by itself
    draw = _draw
    if other == "images":
        draw = lambda seed: _draw(seed + 1)  # noqa: E731
    elif other == "pool":
        pool = PromptPool({name: prompt * 2 for name, prompt in pool.items()}, backbone=vit.info)
    else:
        options["ensemble_options"] = options["ensemble_options"] | {"lam": 0.1}
    found = compare_starts(vit, pool, draw, _draw(99), folder=tmp_path / "kept", **options)
    fresh = compare_starts(vit, pool, draw, _draw(99), **options)
    assert torch.equal(found.ensembles[0].weights, fresh.ensembles[0].weights)
    assert torch.equal(found.curves, fresh.curves)


def test_needs_seeds_and_budgets(vit, pool):
    with pytest.raises(OptionError, match="at least one seed"):
        compare_starts(vit, pool, _draw, _draw(0), seeds=())
    begun = PromptPool(dict(pool), backbone=pool.backbone, metadata={"p1": {"init_seed": 44}})
    with pytest.raises(OptionError, match="seed 44 is that of the sources"):
        compare_starts(vit, begun, _draw, _draw(0))
    with pytest.raises(OptionError, match="at least one seed"):
        compare_starts(vit, pool, _draw, _draw(0), epochs=())
    for twice in ({"seeds": (1, 1)}, {"epochs": (2, 2)}, {"variants": (0.0, 0.0)}):
        (name,) = twice
        with pytest.raises(OptionError, match=f"{name} must differ"):
            compare_starts(vit, pool, _draw, _draw(0), **twice)
