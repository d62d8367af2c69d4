"""Runs functions on several processes of one gloo group, for the tests of what ranks do together."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["hgprompt", "literal"])  # imported once, for all processes


def run(function, world, folder, *arguments, patience=180.0, timeout=60.0):
    """What function(rank, *arguments) returned on every rank; a process that died: its exit code.

    Args:
        folder: for the ranks' meeting and their answers. patience: seconds to wait for them. timeout: of the group.
    """
    folder = Path(folder) / f"{function.__name__}-{world}"
    folder.mkdir()
    processes = [
        _CONTEXT.Process(target=_main, args=(function, rank, world, folder, timeout, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(patience)
            assert process.exitcode is not None, "a rank still runs: it hangs"
    finally:
        for process in processes:
            process.kill()
            process.join()
    answers = [folder / f"{rank}.pt" for rank in range(world)]
    results = [
        torch.load(path, weights_only=False) if path.exists() else process.exitcode
        for path, process in zip(answers, processes, strict=True)
    ]
    for result in results:
        assert not isinstance(result, str), result
    return results


def _main(function, rank, world, folder, timeout, arguments):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=wait)
    try:
        result = function(rank, *arguments)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.tmp")
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.pt")
    if not isinstance(result, str):
        dist.destroy_process_group()
