"""Work of rank 0 that runs beside the training, one job at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from mmpeft_ds.files import cannot_write


class Background:
    """One job at a time in a thread, whose failure is raised where its owner asks.

    The process does not end before a job that has begun has ended, unless it is killed.

    Attributes:
        failed: the last job did not end well.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None
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

    def check(self) -> None:
        """Raise what a job that has ended raised because a file could not be written; returns at once."""
        if self._job is not None and self._job.done() and cannot_write(self._job.exception()):
            self.wait()
