"""Progress on stderr: a bar where a terminal is attached, otherwise a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

LINE_EVERY = 10.0  # seconds between plain lines
T = TypeVar("T")


class Progress:
    """Counts up to `total`. One that is opened while another is shown appears below it.

    Args:
        title: what is going on, in a word or two.
        total: where it ends.
        unit: what is counted, in the plural.
        done: where it begins.
        shown: False: shows nothing, as on every rank but one.
        first_and_last: print a plain line for the first and the last advance, however little time has passed.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "samples",
        done: int = 0,
        shown: bool = True,
        first_and_last: bool = False,
    ):
        self.title, self.total, self.unit, self.done, self.shown = title, total, unit, done, shown
        self.first_and_last = first_and_last
        self.start, self.began, self.printed_at = done, time.monotonic(), time.monotonic()
        self.bar: _Bar | None = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            self.bar = _Bar(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, count: int = 1, note: str = "", details: str = "") -> None:
        """`count` more are done.

        Args:
            note: what else to show, such as a loss; by default the rate.
            details: shown on plain lines alone, which have room for them.
        """
        first, self.done = self.done == self.start, self.done + count
        seconds = max(time.monotonic() - self.began, 1e-9)
        note = note or f"{(self.done - self.start) / seconds:,.1f} {self.unit}/s"
        if self.bar is not None:
            self.bar.update(self.done, note)
            return
        ends = self.first_and_last and (first or self.done >= self.total)
        if self.shown and (ends or time.monotonic() - self.printed_at >= LINE_EVERY):
            left = seconds / max(1, self.done - self.start) * max(0, self.total - self.done)
            self.printed_at = time.monotonic()
            note = f"{details}, {note}" if details else note
            time_left = f"{int(left // 60)}:{int(left % 60):02d}"
            self.say(f"{self.title}: {self.done:,} of {self.total:,} {self.unit}, {note}, left {time_left}")

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, each of which counts as done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.advance()

    def say(self, line: str) -> None:
        """Print a line to stderr, above the bars where there are any."""
        if _Bar.display is not None:
            _Bar.display.console.print(line, highlight=False, markup=False, soft_wrap=True)
        elif self.shown:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class _Bar:
    """A row of the one display of this process, which the first row starts and the last one stops."""

    display: Any = None

    def __init__(self, progress: Progress):
        if _Bar.display is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Display

            _Bar.display = Display(
                TextColumn("{task.description}"),
                BarColumn(20),  # with the note the row fits into 80 columns
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            _Bar.display.start()
        self.task = _Bar.display.add_task(progress.title, total=progress.total, completed=progress.done, note="")

    def update(self, done: int, note: str) -> None:
        _Bar.display.update(self.task, completed=done, note=note)

    def close(self) -> None:
        display = _Bar.display
        if len(display.tasks) > 1:
            display.remove_task(self.task)
            return
        display.stop()  # its last state stays on the terminal
        _Bar.display = None
