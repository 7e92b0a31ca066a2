"""Work of a run's ranks that goes on beside the training, one job at a time."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from mmpeft_ds.distributed.stall import BESIDE
from mmpeft_ds.engine.zero.snapshot import HostCopies
from mmpeft_ds.errors import BadInput

# A rank that is gone shows at once in its connections, and one that is stuck to the watchdog, who knows which it is;
# the ranks wait here for a disk, however slow it is.
PATIENCE = datetime.timedelta(days=1)


class Background:
    """One job at a time in a thread of every rank, whose failure is raised where its owner asks. Collective to make.

    Every rank starts the same jobs in the same order; they talk to each other over `group`, so that their messages
    never mix with those of the training. All owners of a process share the thread and the group.

    The process does not end before a job that has begun has ended, unless it is killed.

    Attributes:
        group: of all ranks, on CPUs; None on one rank.
        copies: what a job reads while the training goes on.
        failed: the last job did not end well.
    """

    def __init__(self) -> None:
        self._thread, self.group = _lane()
        self._job: Future[None] | None = None
        self.copies = HostCopies()
        self.failed = False

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` after the one before, whose failure is raised."""
        self.wait()
        self.failed = False
        self._job = self._thread.submit(job)

    def wait(self) -> None:
        """Return when nothing runs any more. Raises what the job raised, once."""
        if (job := self._job) is not None:
            self._job = None
            self.failed = job.exception() is not None
            job.result()

    def failure(self) -> bool:
        """Whether the last job could not write its files, once it has ended; that is not raised any more. Raises any
        other error of it."""
        with contextlib.suppress(BadInput):
            self.wait()
        return self.failed

    def problem(self) -> Exception | None:
        """What a job that has ended raised, told once; returns at once. A fault of ours says that it was met there."""
        if self._job is None or not self._job.done():
            return None
        try:
            self.wait()
        except BadInput as problem:
            return problem
        except Exception as fault:  # noqa: BLE001 - whatever it is, the other ranks must learn of it
            problem = RuntimeError(f"no checkpoint in the background: {type(fault).__name__}: {fault}")
            problem.__cause__ = fault
            return problem
        return None


def _lane() -> tuple[ThreadPoolExecutor, Any]:
    """The thread and the group of this process, which are made once."""
    whose = (os.getpid(), dist.group.WORLD if dist.is_initialized() else None)
    if not _lanes or _lanes[-1][0] != whose:
        several = whose[1] is not None and dist.get_world_size() > 1
        group = dist.new_group(backend="gloo", timeout=PATIENCE, group_desc=BESIDE) if several else None
        _lanes[:] = [(whose, (ThreadPoolExecutor(1, thread_name_prefix=BESIDE), group))]
    return _lanes[-1][1]


_lanes: list[tuple[Any, tuple[ThreadPoolExecutor, Any]]] = []
