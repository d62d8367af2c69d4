"""What the worker processes of a PyTorch DataLoader do to a program: how they end, and what is said of a dead one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from hgprompt.errors import DataError, HGPromptError


def end_workers(loader: Iterable[Any], iterator: Iterator[Any]) -> None:
    """End a DataLoader's worker processes now. Else they live as long as a traceback refers to the iterator, and
    PyTorch raises the error of one that has died again whenever another child process ends.

    A loader whose iterator is a generator (as ours that skips images) ends its own where the generator is closed. A
    caller's generator that is itself the loader is left as it is: the caller may go on with it.
    """
    end = getattr(iterator, "_shutdown_workers", None)
    if isinstance(iterator, Generator) and iterator is not loader:
        end = iterator.close
    elif getattr(loader, "persistent_workers", False):
        end = None
    if callable(end):
        with contextlib.suppress(RuntimeError):  # that error
            end()


def of_the_loader(error: BaseException) -> BaseException:
    """The error itself, or a DataError where it says that a DataLoader's worker has died: PyTorch raises that from a
    signal, wherever the program is."""
    reason = _of_torch(error)
    return error if reason is None or isinstance(error, HGPromptError) else DataError(f"the loader failed: {reason}")


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Around all that is done while a loader is open: a worker's death as a DataError."""
    try:
        yield
    except Exception as error:
        failure = of_the_loader(error)
        if failure is error:
            raise
        raise failure from error


def of_a_worker(error: HGPromptError) -> HGPromptError:
    """The error itself, where a DataLoader has wrapped it in the traceback of the worker process that raised it."""
    last = _last_line_of_a_worker(error)
    return error if last is None else type(error)(last.partition(": ")[2])


def failure_in_words(error: Exception, *, has_workers: bool) -> str:
    """Why a loader failed, and where its workers have to do with it, what to do.

    Args:
        has_workers: the error came from a DataLoader with worker processes: then a connection that is lost is that to
            one of them, for what is raised within a worker comes with its traceback as text.
    """
    last = _last_line_of_a_worker(error)
    if last is not None:
        return f"{last} (in a worker process)"
    return _of_torch(error, has_workers=has_workers) or f"{type(error).__name__}: {str(error).strip()}"


def _last_line_of_a_worker(error: Exception) -> str | None:
    """Of the traceback that came from a worker process, "Kind: message"; None where the error is of this process."""
    text = str(error).strip()
    return text.splitlines()[-1] if text.startswith("Caught ") and "\n" in text else None


def _of_torch(error: BaseException, *, has_workers: bool = False) -> str | None:
    """What has become of a DataLoader's workers, and what to do; None for other errors."""
    text = str(error).strip()
    lost = has_workers and isinstance(error, (ConnectionError, EOFError)) and not text.startswith("Caught ")
    if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
        return (
            f"no batch came from its workers in time ({text}): one hangs, or its storage is slow. Look for locks in "
            "the dataset's code that were held when the worker was forked, or give the DataLoader a longer timeout"
        )
    if lost or (isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid")):
        first = (text or type(error).__name__).splitlines()[0]
        return (
            f"a worker process has died ({first}): most often the system has killed it for memory. Give fewer workers, "
            "smaller batches or more shared memory"
        )
    return None
