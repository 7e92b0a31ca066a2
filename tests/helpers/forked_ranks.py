"""Run a function on several real gloo ranks, as forked processes of this one."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 60  # seconds


def in_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """What `function(rank, *args)` returns on each rank; whatever one of them raises fails here.

    The function and its arguments need not pickle; what it returns does. Tensors should be detached and small.
    """
    leave_group()
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = fork.Queue()
        processes = [
            fork.Process(target=_rank, args=(queue, Path(folder) / "store", rank, ranks, function, args), daemon=True)
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            found = dict(queue.get(timeout=PATIENCE) for _ in processes)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()
    for rank in range(ranks):
        problem, _ = found[rank]
        assert problem is None, f"rank {rank}:\n{problem}"
    return [found[rank][1] for rank in range(ranks)]


def leave_group() -> None:
    """End a process group that an earlier test made in this process: forked ranks would inherit it, and could not make
    their own."""
    if dist.is_initialized():
        dist.destroy_process_group()
        if "deepspeed.comm.comm" in sys.modules:  # it keeps its own note of the group
            sys.modules["deepspeed.comm.comm"].cdb = None


def _rank(queue: Any, store: Path, rank: int, ranks: int, function: Callable[..., Any], args: tuple) -> None:
    # The pool of this process's parent did not come along: a parallel loop would wait for it for ever.
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=PATIENCE)
        )
        result = (None, function(rank, *args))
    except BaseException:
        result = (traceback.format_exc(), None)
    # numpy: a tensor would go through a file descriptor of a process that is about to end
    queue.put((rank, result))
    queue.close()
    queue.join_thread()
    if dist.is_initialized():
        dist.destroy_process_group()
