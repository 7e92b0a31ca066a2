"""Let rank 0 do something with files and give every rank its result, or its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from mmpeft_ds.errors import BadInput

T = TypeVar("T")


def world_size() -> int:
    """Ranks of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_rank0(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 only and return what it returned on every rank. Collective.

    A failure of rank 0 is raised on all ranks, so that none of them waits in the next collective for a rank that left.

    Raises:
        BadInput: on every rank, if `function` raised it.
        RuntimeError: on the other ranks, naming any other exception of rank 0, which keeps its own there.
    """
    if world_size() == 1:
        return function()
    outcome: list = [None, None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as raised:  # noqa: BLE001 - every failure must reach the other ranks
            error = raised
            outcome[1:] = [isinstance(raised, BadInput), f"{type(raised).__name__}: {raised}"]
            if isinstance(raised, BadInput):
                outcome[2] = str(raised)
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise BadInput(outcome[2]) if outcome[1] else RuntimeError(f"rank 0 failed: {outcome[2]}")
    return outcome[0]
