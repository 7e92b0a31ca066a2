"""Cost of collectives: how often each kind ran, the bytes it received, the time it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from mmpeft_ds.distributed.clock import Clock, Span


@dataclass
class Traffic:
    """Collectives seen while counting.

    Attributes:
        calls: number of collectives of each kind, such as `all_gather`, `reduce_scatter`, `all_reduce`, `shift`.
        bytes: received by this rank per kind, for collectives that run as rings: (N - 1) shares for a gather or a
            reduce-scatter, 2 (N - 1) / N of the tensor for an all-reduce. The same number is sent.
    """

    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _seconds: float = 0.0
    _spans: list[Span] = field(default_factory=list)

    @property
    def total_calls(self) -> int:
        """Collectives of all kinds."""
        return sum(self.calls.values())

    @property
    def total_bytes(self) -> int:
        """Bytes received in all kinds."""
        return sum(self.bytes.values())

    @property
    def seconds(self) -> float:
        """Seconds in collectives, waiting for other ranks included; on a GPU this waits for those that still run."""
        self._seconds += sum(span.seconds() for span in self._spans)
        self._spans.clear()
        return self._seconds


_OPEN: list[Traffic] = []


@contextmanager
def counted(traffic: Traffic | None = None) -> Iterator[Traffic]:
    """Count the collectives of this package's gathers and graphs, backward ones too, until the block ends.

    Args:
        traffic: counts are added to it; None = a new one. Blocks may be nested: each counts.
    """
    traffic = Traffic() if traffic is None else traffic
    _OPEN.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: two counts with equal numbers are not the same.
        _OPEN.pop(next(i for i in reversed(range(len(_OPEN))) if _OPEN[i] is traffic))


@contextmanager
def record(kind: str, received: int, device: torch.device) -> Iterator[None]:
    """Add one collective, which runs inside the block, to every open count.

    Args:
        kind: its name.
        received: bytes that this rank receives.
        device: of its tensors; work on a GPU is timed by events, so that nothing waits here.
    """
    if not _OPEN:
        yield
        return
    clock = Clock(device)
    began = clock.now()
    yield
    span = clock.since(began)
    for traffic in _OPEN:
        traffic.calls[kind] += 1
        traffic.bytes[kind] += received
        traffic._spans.append(span)
