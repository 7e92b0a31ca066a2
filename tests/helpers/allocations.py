"""Bytes of tensors in a real step on the CPU: what is held, and what torch's allocator hands out on top."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

MARK = "from here"
GATHER = "c10d::_allgather_base_"


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
    """Record the allocations of torch's CPU allocator inside, through its profiler.

    Those of gloo for a gather are left out, in its threads and in the call: it copies what it gathers once more, which
    NCCL does not.
    """
    allocated = Allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield allocated
    now = most = 0
    thread, gathering = None, 0  # the one that trains, and when its last call of a gather has returned
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == MARK:
            thread, now, most = event.start_thread_id(), 0, 0
        elif event.name() == GATHER:
            gathering = event.start_ns() + event.duration_ns()
        elif event.name() == "[memory]" and event.start_thread_id() == thread and event.start_ns() > gathering:
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
