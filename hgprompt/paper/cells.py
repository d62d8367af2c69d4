"""Cells: an experiment is a list of them, each a piece of work whose result is one small JSON file.

A cell's file appears whole or not at all, and carries all that its result depends on. So a run may be killed at any
moment: what is finished is never done again, the rest goes on from its own checkpoints, and what was made otherwise
(other data, another backbone, other options) is refused instead of mixed in.

Several processes share the work without speaking to one another: each deals the same list in the same way, does its
own share, and then, on one machine, what nobody has begun of the others'.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgprompt.distributed import place_in_job
from hgprompt.errors import FileFormatError, OptionError, OutputError
from hgprompt.files import differences, file_name, make_directory, read_json, write_text
from hgprompt.progress import Progress, Reporter
from hgprompt.strict_json import jsonable

logger = logging.getLogger(__name__)

_FORMAT, _VERSION = "hgprompt-cell", 1
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Work:
    """What a running cell is given.

    Attributes:
        checkpoints: a directory of its own, for what lets it go on after an interruption; gone when it is finished.
        report: where it reports progress to.
    """

    checkpoints: Path
    report: Reporter


@dataclass(frozen=True, eq=False)
class Cell:
    """A piece of work.

    Attributes:
        key: its name, unique in a plan. identity: JSON-able, all that the result depends on.
        run: does it, and returns a JSON-able record. cost: how long it takes beside the others, in any unit.
    """

    key: str
    identity: Mapping[str, Any]
    run: Callable[[Work], Mapping[str, Any]]
    cost: float = 1.0


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's: rank of world. torchrun says so in RANK and WORLD_SIZE.

    helps: go on with the others' cells when one's own are finished. For processes of one machine: locks on files, which
    keep two from one cell, do not reach other machines on every file system.
    """

    rank: int = 0
    world: int = 1
    helps: bool = False

    @classmethod
    def of_environment(cls) -> Share:
        """As RANK and WORLD_SIZE say; all of it where they say nothing. Helps where LOCAL_WORLD_SIZE says that all
        processes are on this machine.

        Raises:
            OptionError: they say something else than a rank.
        """
        rank, world = place_in_job()
        return cls(rank, world, helps=os.environ.get("LOCAL_WORLD_SIZE") == str(world))

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """This process's cells, in the order of the plan: each cell, the costliest first, goes to whoever has least."""
        loads = [0.0] * self.world
        owner = {}
        for cell in sorted(cells, key=lambda cell: -cell.cost):  # sorted is stable: every process deals alike
            least = loads.index(min(loads))
            loads[least] += cell.cost
            owner[cell.key] = least
        return [cell for cell in cells if owner[cell.key] == self.rank]


class Store:
    """Finished cells of an output folder, under `cells/`."""

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.directory = self.out / "cells"

    def path(self, cell: Cell) -> Path:
        """Of the cell's file, whether it is there or not."""
        return self.directory / f"{file_name(cell.key)}.json"

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a finished cell; None where it is not finished.

        Raises:
            OptionError: the file is of a cell with another identity. FileFormatError: it is damaged.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            stored = read_json(path, max_bytes=_MAX_BYTES)
        except FileFormatError as error:
            raise FileFormatError(f"{error}; delete it to do its work again") from error
        good = isinstance(stored, dict) and (stored.get("format"), stored.get("version")) == (_FORMAT, _VERSION)
        if not good or not isinstance(stored.get("identity"), dict) or not isinstance(stored.get("record"), dict):
            raise FileFormatError(f"{path} is no finished cell of this version; delete it to do its work again")
        mine, theirs = _plain(cell.identity), stored["identity"]
        if mine != theirs:
            raise OptionError(
                f"{path} was made otherwise (it differs in {differences(theirs, mine)}): give another --out, or delete "
                "it to do its work again"
            )
        record: dict[str, Any] = stored["record"]
        return record

    def put(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Write a finished cell's file."""
        whole = {"format": _FORMAT, "version": _VERSION, "key": cell.key}
        whole |= {"identity": _plain(cell.identity), "record": jsonable(dict(record))}
        write_text(self.path(cell), json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n")

    def checkpoints(self, cell: Cell) -> Path:
        """The cell's own directory of checkpoints; work that was begun otherwise (another pool, say) has another."""
        return self._begun(cell) / hashlib.sha256(json.dumps(_plain(cell.identity)).encode()).hexdigest()[:16]

    def forget_checkpoints(self, cell: Cell) -> None:
        """Delete what the cell, however it was begun, has left to go on from."""
        shutil.rmtree(self._begun(cell), ignore_errors=True)

    def has_checkpoints(self, cell: Cell) -> bool:
        """Whether the cell, however it was begun, has left anything to go on from."""
        return self._begun(cell).exists()

    def claimed(self, cell: Cell) -> contextlib.AbstractContextManager[bool | None]:
        """Whether this process alone may work on the cell, while the context lasts; None where nothing can say so."""
        return _claimed(self._begun(cell))

    def _begun(self, cell: Cell) -> Path:
        return self.out / "checkpoints" / file_name(cell.key)

    def finished(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """{key: record} of those that are finished; errors as for `get`."""
        found = {cell.key: self.get(cell) for cell in cells}
        return {key: record for key, record in found.items() if record is not None}


def run_cells(
    store: Store,
    cells: Sequence[Cell],
    *,
    share: Share | None = None,
    progress: bool | Reporter = False,
    stage: str = "cells",
    wait: bool = False,
) -> dict[str, dict[str, Any]]:
    """Do this process's share of what is not finished yet.

    A cell that another process is at (a run of another number of processes, say) is left to it.

    Args:
        store: where results are, and go. cells: the whole plan, the same in every process.
        share: this process's; None: all.
        progress: a bar with the time left, or a callable (stage, done, total).
        wait: return only when the other processes have finished theirs too: for results that the next step needs.

    Returns:
        {key: record} of all that is finished, other processes' too.

    Raises:
        OptionError: two cells of one name, a finished cell of another identity, or another process with this share.
        Anything a cell raises: finished cells stay.
    """
    share = share or Share()
    names = [file_name(cell.key) for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OptionError(f"a plan names every cell once, these it names twice: {', '.join(twice[:5])}")
    make_directory(store.directory)
    with _alone(store.directory / f".{share.rank}-of-{share.world}.lock"), Progress.of(progress) as report:
        done = store.finished(cells)  # also refuses what was made otherwise, before any work
        mine = share.of(cells)
        seconds = cost = 0.0  # of what was finished here

        def tell() -> None:
            ahead = sum(cell.cost for cell in mine if cell.key not in done)
            left = seconds / cost * ahead if cost else None
            report(stage, sum(cell.key in done for cell in mine), len(mine), left=left)

        def work_on(cell: Cell, *, own: bool) -> None:
            nonlocal seconds, cost
            with store.claimed(cell) as alone:
                free = own if alone is None else alone
                record = store.get(cell)  # another process may have finished it meanwhile
                if record is None and free:
                    began = time.perf_counter()
                    record = jsonable(dict(cell.run(Work(make_directory(store.checkpoints(cell)), report))))
                    store.put(cell, record)
                    took = time.perf_counter() - began
                    seconds, cost = seconds + took, cost + cell.cost
                    logger.info("%s finished in %.1f s", cell.key, took)
                if record is not None:
                    done[cell.key] = record
                if free:
                    # Also after a kill between a cell's file and its clean-up: checkpoints that nobody needs.
                    store.forget_checkpoints(cell)

        tell()
        for cell in mine:
            if cell.key not in done or store.has_checkpoints(cell):
                work_on(cell, own=True)
                tell()
        while True:
            for cell in cells:
                if share.helps and cell.key not in done:
                    work_on(cell, own=False)
            if not wait or len(done) == len(cells):
                break
            report("others' cells", len(done), len(cells))
            time.sleep(1.0)
            done |= store.finished([cell for cell in cells if cell.key not in done])
    return done | store.finished([cell for cell in cells if cell.key not in done])


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(identity), sort_keys=True))
    return plain


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """OptionError where another process has this lock."""
    with lock.open("w") as file:
        if _lock(file.fileno()) is False:
            raise OptionError(
                f"another process is at work in {lock.parent.parent} with the same share: wait for it, or start "
                "several with torchrun (or RANK and WORLD_SIZE), which share the work"
            )
        yield


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[bool | None]:
    """`_lock` of a directory, which is made where it is not there."""
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory, os.O_RDONLY)
            break
        except FileNotFoundError:  # whoever had it has just finished, and cleaned up
            continue
        except OSError as error:
            raise OutputError(f"cannot write into {directory}: {error.strerror or error}") from error
    try:
        yield _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether an open file could be locked; None where its file system has no locks: each process keeps to its share.

    The system frees it however this process ends.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("no lock: %s", error)
        return None
    return True
