"""One progress bar when a terminal is attached, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts up to `total` on stderr.

    Args:
        title: what is going on, in a word or two.
        total: where it ends.
        unit: what is counted.
    """

    def __init__(self, title: str, total: int, unit: str = "samples"):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.began, self._said, self._said_at = 0, time.monotonic(), 0, 0.0
        self._bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total)
        return self

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._bar:
            self._bar.advance(self._task, count)
            return
        # A tenth of the way or ten seconds, whichever comes later, and the end.
        now = time.monotonic() - self.began
        far = self.done - self._said >= self.total / 10 and now - self._said_at >= 10
        if far or (self.done >= self.total > self._said):
            rate = self.done / max(now, 1e-9)
            print(
                f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {now:.1f} s, {rate:,.0f} {self.unit}/s",
                file=sys.stderr,
                flush=True,
            )
            self._said, self._said_at = self.done, now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
