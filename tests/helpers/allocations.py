"""Bytes of tensors in a real step on the CPU: what is held, and what torch's allocator hands out on top."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch
from torch._C._profiler import _EventType, _ProfilerEvent

MARK = "from here"
COLLECTIVE = "c10d::"


class Allocated:
    """Allocations from each `mark` to the next.

    Attributes:
        growth: of each, the most bytes that were allocated at a time, above what was at the mark; known at the end.
    """

    growth: Sequence[int] = ()

    def mark(self) -> None:
        """Begin to look; what is there counts from here on as held."""
        with torch.profiler.record_function(MARK):
            pass


@contextlib.contextmanager
def recorded() -> Iterator[Allocated]:
    """Record the allocations of torch's CPU allocator inside, through its profiler.

    Those of gloo for a collective are left out, in its threads and in the call: it copies what it gathers or scatters
    once more, which NCCL does not. Where one of its threads is the last to let go of a tensor, the profiler does not
    see the end of it, so now and then more seems to be there than is: look at several equal steps and take the least.
    """
    allocated = Allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield allocated
    events = _flat(profiler.profiler.kineto_results.experimental_event_tree(), False)
    growth, now, thread = [], 0, None  # the thread that trains
    counted, of_gloo = set(), set()  # addresses
    for event, collective in sorted(events, key=lambda pair: pair[0].start_time_ns):
        if event.name == MARK:
            thread, now = event.start_tid, 0
            growth.append(0)
        if event.tag != _EventType.Allocation or not growth:
            continue
        address, size, own = event.extra_fields.ptr, event.extra_fields.alloc_size, event.start_tid == thread
        if size > 0:
            mine, other = (counted, of_gloo) if own and not collective else (of_gloo, counted)
            mine.add(address)
            other.discard(address)  # where something lay whose end was not recorded
            now += size if mine is counted else 0
        elif address in counted or (own and address not in of_gloo):
            counted.discard(address)
            now += size
        else:
            of_gloo.discard(address)
        growth[-1] = max(growth[-1], now)
    allocated.growth = growth


def _flat(events: Sequence[_ProfilerEvent], collective: bool) -> Iterator[tuple[_ProfilerEvent, bool]]:
    """Events and all inside them, each with whether it is in a call of a collective."""
    for event in events:
        inside = collective or event.name.startswith(COLLECTIVE)
        yield event, inside
        yield from _flat(event.children, inside)


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
