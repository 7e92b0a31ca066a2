"""Times of a device: CUDA events on a GPU, which nothing waits for when they are recorded, else the wall clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Span:
    """A stretch of a device's work.

    Attributes:
        began, ended: CUDA events, or seconds of the wall clock.
    """

    began: Any
    ended: Any

    @property
    def is_over(self) -> bool:
        """Whether the device has done it, asked without waiting."""
        return isinstance(self.ended, float) or self.ended.query()

    def seconds(self) -> float:
        """Its duration in seconds; waits for its end."""
        if isinstance(self.ended, float):
            return self.ended - self.began
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000


class Clock:
    """Measures spans on `device`.

    Args:
        event: makes a CUDA event; a stand-in for tests.
    """

    def __init__(self, device: torch.device, event: Callable[..., Any] | None = None):
        self.device, self.on_gpu = device, device.type == "cuda"
        self._event = event or torch.cuda.Event

    def now(self) -> Any:
        """This moment: on a GPU, that at which its present stream comes so far."""
        if not self.on_gpu:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def since(self, began: Any) -> Span:
        """From `now()` of before until now."""
        return Span(began, self.now())


class StepTimer:
    """Seconds of the parts of steps, such as `data`, `forward`, `backward`.

    A GPU is behind the program, so there `finish` gives the parts of the step before, which it has done by then.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self._now: list[tuple[str, Span]] = []
        self._before: list[tuple[str, Span]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block; a part may have several."""
        began = self.clock.now()
        yield
        self._now.append((name, self.clock.since(began)))

    def finish(self) -> dict[str, float]:
        """End the step; seconds of each part of it, on a GPU of the one before. Never waits for the device."""
        done, self._now = self._now, []
        if self.clock.on_gpu:
            done, self._before = self._before, done
        if not all(span.is_over for _, span in done):
            return {}
        seconds: dict[str, float] = {}
        for name, span in done:
            seconds[name] = seconds.get(name, 0.0) + span.seconds()
        return seconds
