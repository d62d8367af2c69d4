"""The protocol against the same steps taken one by one."""

from __future__ import annotations

import dataclasses
import json
import statistics

import literal
import pytest
import torch

from hgprompt import DataError, FileFormatError, FrozenViT, OptionError, PromptPool
from hgprompt.data import LabelledImages
from hgprompt.tuning import TuneConfig, protocol, random_prompt, tune
from hgprompt.tuning.method import Cost, Setting
from hgprompt.tuning.methods import CONTROLS, METHODS, PANDA, VPT
from hgprompt.tuning.protocol import GRIDS, SEEDS, Grid, choose, select_and_retrain

CONFIG = TuneConfig(epochs=4, batch_size=8)
GRID = Grid((8.0, 0.5, 1e-3), (0.01, 0.0))


@pytest.fixture(scope="module")
def problem():
    vit = FrozenViT.from_timm(literal.tiny_vit().double())
    train800, val200, test = _images(24, 0), _images(12, 1), _images(30, 2)
    both = LabelledImages(
        "set", torch.cat([train800.images, val200.images]), torch.cat([train800.labels, val200.labels])
    )
    setting = Setting(vit, literal.tiny_vit, train800, 3, num_tokens=2)
    return setting, val200, dataclasses.replace(setting, train=both), test


def _images(n, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    noise = torch.randint(0, 110, (n, 3, 16, 16), generator=g)
    return LabelledImages("set", (noise + 40 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def test_is_the_selection_and_the_runs_one_by_one(problem):
    setting, val200, both, test = problem
    outcome = select_and_retrain(METHODS["VPT"], *problem, grid=GRID, config=CONFIG)
    judged = []
    for lr in GRID.rates:
        for decay in GRID.decays:
            config = dataclasses.replace(CONFIG, lr=lr, weight_decay=decay, seed=SEEDS[0])
            start = random_prompt(setting.backbone, 2, seed=SEEDS[0])
            alone = tune(setting.backbone, {"a": start}, setting.train, test=val200, config=config)
            judged.append((alone.accuracy("a"), -lr, -decay))
    assert [p["accuracy"] for p in outcome.grid] == [j[0] for j in judged]
    assert (outcome.chosen.lr, outcome.chosen.weight_decay) == (-max(judged)[1], -max(judged)[2])
    assert outcome.chosen.optimizer == "sgd"
    for seed, accuracy in zip((42, 44, 82), outcome.accuracies, strict=True):
        start = random_prompt(setting.backbone, 2, seed=seed)
        config = dataclasses.replace(outcome.chosen, seed=seed)
        alone = tune(setting.backbone, {"a": start}, both.train, test=test, config=config)
        assert alone.accuracy("a") == accuracy
    assert outcome.mean == statistics.fmean(outcome.accuracies)
    record = json.loads(json.dumps(outcome.record(), allow_nan=False))
    assert record["num_parameters"] == 2 * 16
    assert (record["epochs"], record["images"], record["diverged"]) == (4, 36, [False] * 3)


def test_chunks_and_checkpoints_change_nothing(problem, tmp_path):
    expected = _without_seconds(select_and_retrain(METHODS["VPT"], *problem, grid=GRID, config=CONFIG))
    options = {"grid": GRID, "config": CONFIG, "runs_at_once": 4, "folder": tmp_path / "new"}

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "VPT, final" and done == 9:
            raise Stop

    with pytest.raises(Stop):
        select_and_retrain(METHODS["VPT"], *problem, progress=stop, **options)
    assert len(list((tmp_path / "new").iterdir())) == 3
    assert _without_seconds(select_and_retrain(METHODS["VPT"], *problem, **options)) == expected


class OtherBits(VPT):
    """Starts whose last bits are never twice the same, as another number of threads would have them."""

    def __init__(self):
        super().__init__()
        self._prepared = []  # seeds, for every call

    def prepare(self, setting, configs):
        prepared = super().prepare(setting, configs)
        self._prepared.append([config.seed for config in configs])
        with torch.no_grad():
            for parameters in prepared.learner.parameters:
                parameters["prompt"] *= 1 + 1e-7 * len(self._prepared)
        return prepared


def test_what_was_judged_is_not_prepared_again_and_last_bits_do_not_matter(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "identified", lambda _: {"method": "VPT"})  # the list of calls is no option
    options = {"grid": GRID, "config": CONFIG, "runs_at_once": 4, "folder": tmp_path}

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "VPT, final" and done == 9:
            raise Stop

    method = OtherBits()
    with pytest.raises(Stop):
        select_and_retrain(method, *problem, progress=stop, **options)
    outcome = select_and_retrain(method, *problem, **options)
    final = list(SEEDS)
    assert method._prepared == [[42] * 4, [42] * 2, final, final]  # the final runs alone were prepared twice
    assert outcome.seconds[0] == sum(json.loads(p.read_text())["seconds"] for p in sorted(tmp_path.glob("*.json")))
    undisturbed = select_and_retrain(METHODS["VPT"], *problem, grid=GRID, config=CONFIG)
    assert outcome.chosen == undisturbed.chosen


@pytest.mark.parametrize("what", ["pool", "val200", "train", "config"])
def test_what_was_judged_otherwise_is_refused(problem, tmp_path, what):
    setting, val200, both, test = problem
    pool = PromptPool({f"p{i}": random_prompt(setting.backbone, 2, seed=i) for i in range(2)})
    other = PromptPool({f"p{i}": random_prompt(setting.backbone, 2, seed=i + 5) for i in range(2)})
    options = {"grid": Grid((1.0,), (0.0,)), "config": CONFIG, "seeds": (1,), "folder": tmp_path}

    def judge(setting, val200, **more):
        whole = dataclasses.replace(both, pool=setting.pool)
        select_and_retrain(CONTROLS["uniform"], setting, val200, whole, test, **options | more)

    first = dataclasses.replace(setting, pool=pool)
    judge(first, val200)
    others = {
        "pool": lambda: judge(dataclasses.replace(setting, pool=other), val200),
        "val200": lambda: judge(first, _images(12, 7)),
        "train": lambda: judge(dataclasses.replace(first, train=_images(24, 8)), val200),
        "config": lambda: judge(first, val200, config=dataclasses.replace(CONFIG, epochs=5)),
    }
    with pytest.raises(OptionError, match=r"grid 1.json is of another run"):
        others[what]()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: "{",
        lambda record: [],
        lambda record: record | {"version": 0},
        lambda record: record | {"accuracies": [0.5]},
        lambda record: record | {"accuracies": ["0.5", 0.1, 0.1]},
        lambda record: record | {"diverged": [0, 0, 0]},
        lambda record: record | {"cost": {"forward": 1}},
        lambda record: record | {"cost": {"forward": 1, "backward": None}},
        lambda record: record | {"seconds": "1"},
    ],
)
def test_damaged_judgements_are_named(problem, tmp_path, change):
    options = {"grid": Grid((1.0, 0.5, 0.1), (0.0,)), "config": CONFIG, "seeds": (1,), "folder": tmp_path}
    select_and_retrain(METHODS["VPT"], *problem, **options)
    (path,) = tmp_path.glob("*.json")
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(FileFormatError, match=r"VPT-grid 1\.json"):
        select_and_retrain(METHODS["VPT"], *problem, **options)


def _without_seconds(outcome):
    return {key: value for key, value in outcome.record().items() if key != "seconds"}


def test_a_rate_that_diverges_loses(problem):
    grid = Grid((1e6, 1e-3), (1e3,))  # rate times decay: 1e9, and 1
    outcome = select_and_retrain(METHODS["VPT"], *problem, grid=grid, config=dataclasses.replace(CONFIG, epochs=12))
    assert outcome.grid[0]["accuracy"] == 0
    assert (outcome.chosen.lr, outcome.chosen.weight_decay) == (1e-3, 1e3)
    with pytest.raises(DataError, match="diverges at every point"):
        select_and_retrain(
            METHODS["VPT"], *problem, grid=Grid((1e6,), (1e3,)), config=dataclasses.replace(CONFIG, epochs=12)
        )


def test_buffers_of_a_diverged_run_do_not_spoil_its_checkpoint(problem, tmp_path):
    """BatchNorm's statistics: the run goes on through the network beside the others, and they become infinite."""
    options = {"grid": Grid((1e6, 0.1), (1e3,)), "config": dataclasses.replace(CONFIG, epochs=12), "folder": tmp_path}

    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if stage == "MLP-3, final" and done == 2:
            raise Stop

    with pytest.raises(Stop):
        select_and_retrain(METHODS["MLP-3"], *problem, progress=stop, **options)
    outcome = select_and_retrain(METHODS["MLP-3"], *problem, **options)
    assert outcome.grid[0]["accuracy"] == 0


def test_a_checkpoint_knows_how_its_method_was_made(problem, tmp_path):
    setting, val200, both, test = problem
    pool = PromptPool({f"p{i}": random_prompt(setting.backbone, 2, seed=i) for i in range(2)})
    first, second = (dataclasses.replace(s, pool=pool) for s in (setting, both))
    options = {"grid": Grid((1.0,), (0.0,)), "config": CONFIG, "seeds": (1,), "folder": tmp_path}
    select_and_retrain(PANDA(0.01), first, val200, second, test, **options)
    with pytest.raises(OptionError, match="another run"):
        select_and_retrain(PANDA(100.0), first, val200, second, test, **options)


def test_methods_may_change_their_configs(problem):
    setting, val200, both, test = problem
    pool = PromptPool({f"p{i}": random_prompt(setting.backbone, 2, seed=i) for i in range(2)})
    settings = (dataclasses.replace(s, pool=pool) for s in (setting, both))
    first, second = settings
    longer = select_and_retrain(
        CONTROLS["random, equal compute"], first, val200, second, test, grid=Grid((1.0,), (0.0,)), config=CONFIG,
        seeds=(1,),
    )  # fmt: skip
    assert longer.epochs == CONFIG.epochs + longer.report["extra epochs"]
    assert longer.record()["std"] is None


def test_ties_go_to_the_smaller_rate():
    def point(accuracy, lr, decay):
        return {"accuracy": accuracy, "lr": lr, "weight_decay": decay}

    assert choose([point(0.5, 1, 0), point(0.5, 0.1, 0.1), point(0.5, 0.1, 0.01), point(0.4, 0.01, 0)]) == 2


def test_grids_are_vpts():
    full = GRIDS["full"]
    assert len(full["prompt"].configs(CONFIG, "prompt")) == 40
    assert {c.optimizer for c in full["fine-tune"].configs(CONFIG, "fine-tune")} == {"adamw"}
    assert full["fine-tune"].rates == (0.005, 0.001, 0.0005, 0.0001)
    assert {c.optimizer for kind in ("prompt", "linear") for c in full[kind].configs(CONFIG, kind)} == {"sgd"}
    for name in ("rates", "quick"):
        assert all(set(GRIDS[name][kind].rates) <= set(full[kind].rates) for kind in ("prompt", "linear"))
        # Made for a hundred epochs: after a few, networks that are trained have only begun at VPT's largest rate.
        assert min(GRIDS[name]["fine-tune"].rates) <= 0.005 < max(GRIDS[name]["fine-tune"].rates)


def test_a_grid_of_ones_own_has_the_kinds_optimiser():
    own = Grid((0.01,), (0.0,))
    assert [own.configs(CONFIG, kind)[0].optimizer for kind in ("prompt", "linear", "fine-tune")] == [
        "sgd", "sgd", "adamw",
    ]  # fmt: skip


def test_prompts_by_adamw_at_their_authors_rate():
    quick, other = GRIDS["quick"], GRIDS["quick-adamw"]
    assert {kind for kind in quick if other[kind] != quick[kind]} == {"prompt"}
    points = other["prompt"].configs(CONFIG, "prompt")
    assert {point.optimizer for point in points} == {"adamw"}
    # ATTEMPT's 0.3, at a batch of 64; VPT scales a base rate by batch / 256.
    assert any(point.lr * 64 / 256 == pytest.approx(0.3, rel=0.1) for point in points)


def test_refuses_bad_options(problem):
    for options, message in (
        ({"grid": "huge"}, "grid must be"), ({"seeds": ()}, "at least one seed"), ({"runs_at_once": 0}, "runs_at_once"),
        ({"grid": Grid((), (0.0,))}, "one rate"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            select_and_retrain(METHODS["VPT"], *problem, **options)


class Costly(VPT):
    """A start that takes a pass over the images to find."""

    def start(self, setting, seed):
        return super().start(setting, seed)._replace(cost=Cost(forward=len(setting.train)))


@pytest.mark.parametrize(("at_once", "chunks"), [(6, 1), (4, 2), (1, 6)])
def test_the_selection_costs_what_all_its_chunks_cost(problem, at_once, chunks, tmp_path):
    options = {"grid": GRID, "config": dataclasses.replace(CONFIG, epochs=1), "seeds": (1, 2), "folder": tmp_path}
    train800, _, train1000, _ = problem
    for _ in range(2):  # also where they are read from files
        outcome = select_and_retrain(Costly(), *problem, runs_at_once=at_once, **options)
        assert outcome.selection_cost == Cost(forward=len(train800.train) * chunks)
        assert outcome.cost == Cost(forward=len(train1000.train) * 2)
