"""hgprompt train-source, hgprompt tune"""

from __future__ import annotations

import dataclasses
import functools
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
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    tokens: Tokens = None,
    deep: Annotated[bool, typer.Option("--deep", help="Prompt tokens of its own for every block (VPT-deep).")] = False,
    split: options.Split = "train800val200",
    limit: options.Limit = None,
    bad_images: options.BadImages = "stop",
    follow_links: options.FollowLinks = False,
    epochs: options.Epochs = 20,
    batch_size: options.BatchSize = 32,
    optimizer: options.Optimizer = "adamw",
    lr: options.LearningRate = 0.16,
    head_lr: options.HeadLearningRate = None,
    weight_decay: options.WeightDecay = 1e-4,
    warmup: options.Warmup = 0.1,
    prompt_dropout: options.PromptDropout = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the random start, the head and the order of images; default: the pool's, or 0.",
            min=0,
            max=2**63 - 1,
            show_default=False,
            rich_help_panel=options.TRAINING_PANEL,
        ),
    ] = None,
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
    from hgprompt.errors import OptionError
    from hgprompt.files import locked, make_directory
    from hgprompt.pool import PromptPool, check_name
    from hgprompt.tuning import TuneConfig, random_prompt
    from hgprompt.tuning import tune as run

    if name is not None and len(data) > 1:
        raise OptionError("--name goes with one source task; several are named after their folders")
    names = [name or options.task_name(source) for source in data]
    for each in names:
        check_name(each)
    known = PromptPool.load(pool) if pool.exists() else None
    vit = options.load_backbone(
        None if known is None else known.backbone, backbone, weights=weights, device=device, dtype=dtype,
        image_size=image_size, default="mini", mean=mean, std=std, interpolation=interpolation,
    )  # fmt: skip
    if known is not None:
        deep, tokens, seed = _as_in_the_pool(known, pool, vit, deep, tokens, seed)
    tokens, seed = tokens or 10, 0 if seed is None else seed  # none of the seeds that runs have by default
    config = TuneConfig(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr,
        head_lr=lr / 4 if head_lr is None else head_lr, weight_decay=weight_decay, warmup=warmup,
        prompt_dropout=prompt_dropout, seed=seed,
    )  # fmt: skip
    make_directory(pool.parent)
    # What cannot be read is an error before the work, not in the middle of it.
    read = functools.partial(
        options.load_images, quiet=quiet or as_json, bad_images=bad_images, follow_links=follow_links
    )
    all_images = [read(d, split, vit, limit=limit) for d in data]
    records = [_record(images, vit, config) for images in all_images]
    todo = _not_yet_there(names, records, known, pool)
    start = random_prompt(vit, tokens, deep=deep, seed=seed)
    for source, images, record in zip(names, all_images, records, strict=True):
        if source not in todo:
            typer.echo(f"{source} is in {pool} already, tuned in the same way on the same images", err=True)
            continue
        checkpoint = _checkpoint(pool, source)
        tuned = run(
            vit, {source: start}, images, config=config, checkpoint=checkpoint, progress=not (quiet or as_json),
            stage=source, workers=available_cores(),
        )  # fmt: skip
        last = tuned.history[-1]
        record |= {"train_accuracy": last["train_accuracy"][0], "loss": last["loss"][0]}
        fresh = PromptPool({source: tuned.prompt(source)}, backbone=vit.info, metadata={source: record})
        with locked(pool):  # another command may add to the same pool
            known = PromptPool.load(pool).merge(fresh) if pool.exists() else fresh
            known.save(pool)  # after each source: an interruption keeps those that are done
        checkpoint.unlink(missing_ok=True)
    assert known is not None
    if as_json:
        trained = {name: known.metadata[name] for name in names}
        show.print_json({"trained": trained, "pool": list(known), "files": [pool]} | show.skipped_images(*all_images))
        return
    show.print_pool(known, title=str(pool.name))
    if todo:
        show.print_files([pool])


def tune(
    data: options.Data,
    start: Annotated[
        str,
        typer.Option(
            help="Folder that 'ensemble' or 'tune' wrote, POOL.safetensors:NAME for one of a pool, or random."
        ),
    ] = RANDOM,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the results.", rich_help_panel=options.OUTPUT_PANEL)
    ] = Path("hgprompt-tuned"),
    backbone: options.Backbone = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    interpolation: options.Interpolation = None,
    tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens of a random start; default: 10.", min=1, max=10_000)
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="A random start with tokens for every block.")] = False,
    split: options.Split = "train800val200",
    test: Annotated[
        str | None,
        typer.Option(
            help="What to test on: a split (val200 beside --split train800; procedural tasks: test), or another task "
            "with the same classes, a folder or procedural:NAME."
        ),
    ] = None,
    evaluate_every: Annotated[int, typer.Option(help="Epochs between tests; 0: after the last alone.", min=0)] = 1,
    limit: options.Limit = None,
    bad_images: options.BadImages = "stop",
    follow_links: options.FollowLinks = False,
    epochs: options.Epochs = 20,
    batch_size: options.BatchSize = 32,
    optimizer: options.Optimizer = "adamw",
    lr: options.LearningRate = 0.16,
    head_lr: options.HeadLearningRate = None,
    head: options.HeadStart = "random",
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
    from hgprompt.errors import OptionError
    from hgprompt.files import output_directory
    from hgprompt.plots import plot_tuning
    from hgprompt.tuning import TuneConfig, random_prompt
    from hgprompt.tuning import tune as run

    prompt, info = _start(start)
    if prompt is not None and (tokens is not None or deep):
        raise OptionError("--tokens and --deep are of a random start: this one has its own")
    tests = None if test is None else _test_place(data, test)
    if tests is not None:
        _warn_of_training_images(data, split, tests, follow_links=follow_links)
    with output_directory(out):
        vit = options.load_backbone(
            info, backbone, weights=weights, device=device, dtype=dtype, image_size=image_size, default="mini",
            mean=mean, std=std, interpolation=interpolation,
        )  # fmt: skip
        config = TuneConfig(
            epochs=epochs, batch_size=batch_size, optimizer=optimizer, lr=lr,
            head_lr=lr / 4 if head_lr is None else head_lr, weight_decay=weight_decay, warmup=warmup,
            prompt_dropout=prompt_dropout, seed=seed,
        )  # fmt: skip
        read = functools.partial(
            options.load_images, quiet=quiet or as_json, bad_images=bad_images, follow_links=follow_links
        )
        images = read(data, split, vit, limit=limit)
        tested = None if tests is None else read(*tests, vit, limit=None)
        if prompt is None:
            prompt = random_prompt(vit, tokens or 10, deep=deep, seed=seed)
        elif info is not None:
            info.check(vit.info)
        checkpoint = out / "checkpoint.safetensors"
        result = run(
            vit, {_start_name(start): prompt}, images, test=tested, config=config, head=head,
            evaluate_every=evaluate_every, checkpoint=checkpoint, progress=not (quiet or as_json),
            workers=available_cores(),
        )  # fmt: skip
        files = [*result.save(out), out / "tuning.png"]
        plot_tuning(result, files[-1])
        checkpoint.unlink(missing_ok=True)
    if as_json:
        last = result.history[-1]
        skipped = show.skipped_images(images, tested)
        show.print_json({"task": result.task, "start": start, "last": last, "files": files} | skipped)
        return
    show.print_tuned(result)
    show.print_files(files)


def _as_in_the_pool(
    known: PromptPool, path: Path, vit: FrozenViT, deep: bool, tokens: int | None, seed: int | None
) -> tuple[bool, int, int | None]:
    """Kind, tokens and seed of the pool's prompts, which a new one shares; PromptError where it was asked not to."""
    from hgprompt.errors import PromptError

    if known.backbone is None:
        raise PromptError(f"{path} does not say which backbone its prompts are for: give another --pool")
    known.check_backbone(vit.info)
    if deep and not known.is_deep:
        raise PromptError(f"{path} holds shallow prompts: a pool has prompts of one kind; give another --pool")
    if tokens not in (None, known.num_tokens):
        raise PromptError(f"{path} holds prompts of {known.num_tokens} tokens, not {tokens}: give another --pool")
    seeds = {record["init_seed"] for record in known.metadata.values() if type(record.get("init_seed")) is int}
    if seed is not None and seeds and seeds != {seed}:
        raise PromptError(
            f"the prompts of {path} started from seed {', '.join(map(str, sorted(seeds)))}, not {seed}: a mixture "
            "means something only where all had one start; leave --seed out, or give another --pool"
        )
    return known.is_deep, known.num_tokens, min(seeds) if seed is None and seeds else seed


def _checkpoint(pool: Path, source: str) -> Path:
    """Beside the pool, under a name that any source name can be turned into."""
    from hgprompt.files import file_name

    return pool.with_name(f"{pool.stem[:60]}.{file_name(source, 60)}.checkpoint.safetensors")


def _record(images: LabelledImages | ImageDataset, vit: FrozenViT, config: TuneConfig) -> dict[str, Any]:
    """What a pool records of a source before it is tuned: two tunings with one record are one and the same."""
    from hgprompt.tuning.checkpoint import digest_of_images

    training = {k: v for k, v in dataclasses.asdict(config).items() if k != "seed"}
    training |= {"images": len(images), "classes": images.num_classes, "pixels": vit.image_size[0]}
    if images.skipped is not None:
        training["skipped_images"] = images.skipped.count
    training |= {"mean": list(vit.mean), "std": list(vit.std)}
    training |= {"dtype": str(vit.dtype).removeprefix("torch."), "data": digest_of_images(images)[:16]}
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


def _start(start: str) -> tuple[Tensor | None, BackboneInfo | None]:
    from hgprompt.errors import OptionError
    from hgprompt.pool import PromptPool
    from hgprompt.result import EnsembleResult

    if start == RANDOM:
        return None, None
    found = options.opened(Path(start))
    if found is not None:
        if isinstance(found, EnsembleResult):
            return found.prompt, found.backbone
        if len(found.names) > 1:
            raise OptionError(
                f"--start {start} holds {len(found.names)} tunings ({', '.join(found.names)}): save the prompt of one "
                "in a pool, and give POOL.safetensors:NAME"
            )
        return found.prompts[0], found.backbone
    parts = ((start[:i], start[i + 1 :]) for i, c in enumerate(start) if c == ":")  # a name may have some of its own
    path, name = next(((path, name) for path, name in parts if Path(path).is_file()), ("", ""))
    if not path and Path(start).is_file():
        names = PromptPool.load(start).names
        raise OptionError(f"--start {start} is a pool: give one of its prompts, as in {start}:{names[0]}")
    if not path:
        file = start.rpartition(":")[0] or start
        raise OptionError(
            f"--start: there is no {file!r}. It takes a folder that 'ensemble' or 'tune' wrote, "
            "POOL.safetensors:NAME, or 'random'"
        )
    pool = PromptPool.load(path)
    return pool[name], pool.backbone


def _start_name(start: str) -> str:
    return start if start == RANDOM else Path(start).name


def _test_place(data: str, test: str) -> tuple[str, str]:
    """Task and split of the test images: another split of the data, or another task with the same classes."""
    from hgprompt.data import PROCEDURAL_TASKS
    from hgprompt.data.listing import under_an_alias
    from hgprompt.errors import DataError

    rendered = data.startswith(options.PROCEDURAL)
    if (rendered and test == "test") or (under_an_alias(Path(data)) / f"{test}.txt").is_file():
        return data, test
    if test.removeprefix(options.PROCEDURAL) in PROCEDURAL_TASKS and test.startswith(options.PROCEDURAL):
        return test, "test"
    if Path(test).is_dir():
        return test, "test"
    splits = "its split is 'test'" if rendered else "it has no split of that name"
    raise DataError(f"--test {test!r} is neither a split of {data} ({splits}) nor a folder with the same classes")


def _warn_of_training_images(data: str, split: str, tests: tuple[str, str], *, follow_links: bool) -> None:
    """An accuracy on images that are trained on says nothing: train800val200 holds val200."""
    from hgprompt.data import load_task

    if any(place.startswith(options.PROCEDURAL) for place in (data, tests[0])):
        return
    trained = {path for path, _ in load_task(data, split, follow_links=follow_links).samples}
    tested = [path for path, _ in load_task(*tests, follow_links=follow_links).samples]
    both = sum(path in trained for path in tested)
    if both:
        typer.secho(
            f"warning: {both} of {len(tested)} test images are among those of --split {split}: their accuracy is no "
            "test's. To test on val200, train on --split train800",
            fg="yellow", err=True,
        )  # fmt: skip
