"""hgprompt train-source, hgprompt tune"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hgprompt.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from hgprompt.backbone import FrozenViT
    from hgprompt.data import ImageDataset, LabelledImages
    from hgprompt.pool import BackboneInfo, PromptPool
    from hgprompt.tuning import TuneConfig

Tokens = Annotated[int | None, typer.Option(help="Prompt tokens; default: the pool's, or 10.", min=1, max=10_000)]
RANDOM = "random"


def train_source(
    data: options.DataList,
    pool: Annotated[
        Path, typer.Option("--pool", "-p", help="Pool to make, or to add to.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("pool.safetensors"),
    name: Annotated[
        str | None, typer.Option(help="Name of the prompt (one source alone); default: the folder's name.")
    ] = None,
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    tokens: Tokens = None,
    deep: Annotated[bool, typer.Option("--deep", help="Prompt tokens of its own for every block (VPT-deep).")] = False,
    split: options.Split = "train800val200",
    limit: options.Limit = None,
    epochs: options.Epochs = 20,
    batch_size: options.BatchSize = 32,
    optimizer: options.Optimizer = "adamw",
    lr: options.LearningRate = 0.16,
    head_lr: options.HeadLearningRate = None,
    weight_decay: options.WeightDecay = 1e-4,
    warmup: options.Warmup = 0.1,
    prompt_dropout: options.PromptDropout = 0.0,
    seed: options.Seed = 42,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tune a prompt on each source task and put it into a pool.

    The prompts of one pool share the backbone, the number of tokens and the seed of their random start. Interrupted,
    the same command goes on from the last finished epoch.
    """
    from hgprompt.cli import show
    from hgprompt.data.folders import available_cores
    from hgprompt.errors import OptionError, PromptError
    from hgprompt.pool import PromptPool
    from hgprompt.tuning import random_prompt
    from hgprompt.tuning import tune as run

    if name is not None and len(data) > 1:
        raise OptionError("--name goes with one source task; several are named after their folders")
    names = [name or options.task_name(source) for source in data]
    known = PromptPool.load(pool) if pool.exists() else None
    vit = options.load_backbone(
        None if known is None else known.backbone, backbone, weights, device, dtype, image_size, default="mini"
    )
    if known is not None:
        known.check_backbone(vit.info)
        if deep and not known.is_deep:
            raise PromptError(f"{pool} holds shallow prompts: a pool has prompts of one kind; give another --pool")
        deep = known.is_deep
    tokens = tokens or (10 if known is None else known.num_tokens)
    config = _config(epochs, batch_size, optimizer, lr, head_lr, weight_decay, warmup, prompt_dropout, seed)
    _try_to_write(pool)
    # What cannot be read is an error before the work, not in the middle of it.
    all_images = [options.load_images(d, split, vit, limit=limit, seed=seed, quiet=quiet or as_json) for d in data]
    records = [_record(images, config) for images in all_images]
    todo = _not_yet_there(names, records, known, pool)
    start = random_prompt(vit, tokens, deep=deep, seed=seed)
    for source, images, record in zip(names, all_images, records, strict=True):
        if source not in todo:
            continue
        checkpoint = pool.with_name(f"{pool.stem}.{source}.checkpoint.safetensors")
        tuned = run(
            vit, {source: start}, images, config=config, checkpoint=checkpoint, progress=not (quiet or as_json),
            stage=source, workers=available_cores(),
        )  # fmt: skip
        last = tuned.history[-1]
        record |= {"train_accuracy": last["train_accuracy"][0], "loss": last["loss"][0]}
        fresh = PromptPool({source: tuned.prompt(source)}, backbone=vit.info, metadata={source: record})
        known = fresh if known is None else known.merge(fresh)
        known.save(pool)  # after each source: an interruption keeps those that are done
        checkpoint.unlink(missing_ok=True)
    assert known is not None
    if as_json:
        trained = {name: known.metadata[name] for name in names}
        show.print_json({"trained": trained, "pool": list(known), "files": [pool]})
        return
    show.print_pool(known, title=str(pool.name))
    show.print_files([pool])


def tune(
    data: options.Data,
    start: Annotated[
        str,
        typer.Option(help="Folder that 'ensemble' wrote, POOL.safetensors:NAME for one prompt of a pool, or random."),
    ] = RANDOM,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-tuned"),
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    tokens: Annotated[int, typer.Option(help="Prompt tokens of a random start.", min=1, max=10_000)] = 10,
    deep: Annotated[bool, typer.Option("--deep", help="A random start with tokens for every block.")] = False,
    split: options.Split = "train800val200",
    test: Annotated[
        str | None,
        typer.Option(help="What to test on: a split (procedural tasks: test), or a folder with the same classes."),
    ] = None,
    limit: options.Limit = None,
    epochs: options.Epochs = 20,
    batch_size: options.BatchSize = 32,
    optimizer: options.Optimizer = "adamw",
    lr: options.LearningRate = 0.16,
    head_lr: options.HeadLearningRate = None,
    weight_decay: options.WeightDecay = 1e-4,
    warmup: options.Warmup = 0.1,
    prompt_dropout: options.PromptDropout = 0.0,
    seed: options.Seed = 42,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Tune a prompt and a linear head on the new task, from a mixture or from anywhere else.

    Writes the tuned prompt with its head, the record of all epochs and a figure. Interrupted, the same command goes on
    from the last finished epoch.
    """
    from hgprompt.cli import show
    from hgprompt.data.folders import available_cores
    from hgprompt.files import make_directory
    from hgprompt.plots import plot_tuning
    from hgprompt.tuning import random_prompt
    from hgprompt.tuning import tune as run

    prompt, info = _start(start)
    make_directory(out)
    vit = options.load_backbone(info, backbone, weights, device, dtype, image_size, default="mini")
    config = _config(epochs, batch_size, optimizer, lr, head_lr, weight_decay, warmup, prompt_dropout, seed)
    images = options.load_images(data, split, vit, limit=limit, seed=seed, quiet=quiet or as_json)
    tested = None if test is None else _test_images(data, test, images, vit, quiet or as_json)
    if prompt is None:
        prompt = random_prompt(vit, tokens, deep=deep, seed=seed)
    elif info is not None:
        _check_backbone(info, vit, start)
    checkpoint = out / "checkpoint.safetensors"
    result = run(
        vit, {_start_name(start): prompt}, images, test=tested, config=config, evaluate_every=1, checkpoint=checkpoint,
        progress=not (quiet or as_json), workers=available_cores(),
    )  # fmt: skip
    files = [*result.save(out), out / "tuning.png"]
    plot_tuning(result, files[-1])
    checkpoint.unlink(missing_ok=True)
    if as_json:
        last = result.history[-1]
        show.print_json({"task": result.task, "start": start, "last": last, "files": files})
        return
    show.print_tuned(result)
    show.print_files(files)


def _config(
    epochs: int,
    batch_size: int,
    optimizer: str,
    lr: float,
    head_lr: float | None,
    weight_decay: float,
    warmup: float,
    prompt_dropout: float,
    seed: int,
) -> TuneConfig:
    from hgprompt.tuning import TuneConfig

    return TuneConfig(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr, head_lr=head_lr,  # type: ignore[arg-type]
        weight_decay=weight_decay, warmup=warmup, prompt_dropout=prompt_dropout, seed=seed,
    )  # fmt: skip


def _record(images: LabelledImages | ImageDataset, config: TuneConfig) -> dict[str, Any]:
    """What a pool records of a source before it is tuned."""
    training = {k: v for k, v in dataclasses.asdict(config).items() if k != "seed"}
    training |= {"images": len(images), "classes": images.num_classes}
    return {"task": images.name, "init_seed": config.seed, "training": training}


def _not_yet_there(names: list[str], records: list[dict[str, Any]], known: PromptPool | None, path: Path) -> set[str]:
    """Sources still to tune: one that the pool has, tuned in the same way, was finished before an interruption."""
    from hgprompt.errors import PromptError

    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise PromptError(f"several sources are named {', '.join(twice)}: tune them one by one, with --name")
    todo = set()
    for name, record in zip(names, records, strict=True):
        if known is None or name not in known:
            todo.add(name)
        elif {k: known.metadata[name].get(k) for k in record} != record:
            raise PromptError(
                f"{path} already has a prompt named {name!r}, tuned otherwise: give --name, or another --pool"
            )
    return todo


def _try_to_write(path: Path) -> None:
    """OutputError now and not after the training."""
    import tempfile

    from hgprompt.errors import OutputError

    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def _start(start: str) -> tuple[Tensor | None, BackboneInfo | None]:
    from hgprompt.errors import OptionError
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult

    if start == RANDOM:
        return None, None
    if Path(start).is_dir():
        result = EnsembleResult.load(start)
        return result.prompt, result.backbone
    path, colon, name = start.rpartition(":")
    if not colon or not Path(path).is_file():
        raise OptionError(f"--start {start!r} is no folder of an ensemble, no POOL.safetensors:NAME and not 'random'")
    pool = PromptPool.load(path)
    return pool[name], pool.backbone


def _start_name(start: str) -> str:
    return start if start == RANDOM else Path(start).name


def _check_backbone(info: BackboneInfo, vit: FrozenViT, start: str) -> None:
    from hgprompt.errors import PromptError

    if info.fingerprint and vit.fingerprint and info.fingerprint != vit.fingerprint:
        raise PromptError(
            f"{start} was made for the backbone {info.name}, this is {vit.name} with other weights: a prompt means "
            "nothing to other weights"
        )


def _test_images(
    data: str, test: str, train: LabelledImages | ImageDataset, vit: FrozenViT, quiet: bool
) -> LabelledImages | ImageDataset:
    """The images of another split, or of another folder with the same classes."""
    from hgprompt.errors import DataError

    if data.startswith(options.PROCEDURAL) or any(Path(data).glob("*.txt")):
        return options.load_images(data, test, vit, limit=None, quiet=quiet)
    if not Path(test).is_dir():
        raise DataError(f"{data} has no splits: --test must be a folder with the same classes, got {test!r}")
    images = options.load_images(test, "test", vit, limit=None, quiet=quiet)
    if images.class_names != train.class_names:
        raise DataError(
            f"the classes of {test} ({_some(images.class_names)}) are not those of {data} ({_some(train.class_names)})"
        )
    return images


def _some(names: tuple[str, ...] | None) -> str:
    known = names or ()
    return ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
