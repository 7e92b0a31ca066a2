"""Bytes of tensors in a real step on the CPU: what is held, and what torch's allocator hands out on top."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

MARK = "from here"


class Allocated:
    """Allocations from `mark` on.

    Attributes:
        growth: the most bytes that were allocated at a time, above what was at the mark; known at the end.
    """

    growth = 0

    def mark(self) -> None:
        """Begin to look; what earlier steps left counts from here on as held."""
        with torch.profiler.record_function(MARK):
            pass


@contextlib.contextmanager
def recorded() -> Iterator[Allocated]:
    """Record every allocation of torch's CPU allocator inside, through its profiler."""
    allocated = Allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield allocated
    now = most = 0
    looking = False
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == MARK:
            looking, now, most = True, 0, 0
        elif event.name() == "[memory]" and looking:
            now += event.nbytes()
            most = max(most, now)
    allocated.growth = most


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python holds, each once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # other kinds of tensors, such as those of graphs that other tests have captured, hold no memory
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
