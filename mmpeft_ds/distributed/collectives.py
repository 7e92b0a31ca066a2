"""Small collectives of the training loop; without a process group each works as on a single rank.

Every function here must be called by all ranks in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from mmpeft_ds.errors import AgreedBadInput, BadInput
from mmpeft_ds.files import cannot_write

T = TypeVar("T")


def world_size(group: Any = None) -> int:
    """Ranks of a process group, by default of the run; 1 without one."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Any = None) -> int:
    """This rank in a process group, by default in the run; 0 without one."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def sum_scalars(values: Sequence[float], device: torch.device | str = "cpu", group: Any = None) -> list[float]:
    """Sums over ranks, in float64; integers are exact below 2**53.

    The result has the same bits on every rank: gloo and NCCL reduce each element once and send the result to all.
    """
    if world_size(group) == 1:
        return [float(v) for v in values]
    packed = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(packed, group=group)
    return packed.tolist()


def max_scalars(values: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """Largest of each value over ranks."""
    if world_size() == 1:
        return list(values)
    packed = torch.tensor(list(values), dtype=torch.int64, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return packed.tolist()


def sum_mod_2_64(halves: Sequence[float]) -> int:
    """The sum of numbers mod 2^64, from the sums of their halves (see `split_64`)."""
    low, high = (int(h) for h in halves)
    return (low + (high << 32)) % 2**64


def split_64(value: int) -> tuple[float, float]:
    """Low and high half of an unsigned 64-bit number; sums of up to 2**21 ranks stay exact in float64."""
    return float(value & 0xFFFFFFFF), float(value >> 32)


def first_message(mine: str) -> str:
    """The message of the lowest rank that has one, on all ranks; empty if none has."""
    if world_size() == 1:
        return mine
    everyone: list[str] = [""] * world_size()
    dist.all_gather_object(everyone, mine)
    return next(filter(None, everyone), "")


def raise_first(mine: Exception | None) -> NoReturn:
    """Raise the problem of the lowest rank that has one, on all ranks. Collective.

    Args:
        mine: of this rank, None if it has none.

    Raises:
        AgreedBadInput: on every rank, if it is bad input.
        RuntimeError: on every rank, naming that rank, if it is anything else.
    """
    told = [(isinstance(mine, BadInput), _words(mine))] if mine is not None else []
    bad_input, words = gather_everywhere(told)[0]
    raise (AgreedBadInput if bad_input else RuntimeError)(words) from mine


def _words(problem: Exception) -> str:
    """A problem of this rank in a line."""
    text = str(problem)
    return text if isinstance(problem, BadInput) else f"rank {rank()} failed: {text or type(problem).__name__}"


def gather_to_first(rows: list[Any], group: Any = None) -> list[Any] | None:
    """Rows of all ranks in rank order on rank 0, None elsewhere. Rows must pickle."""
    if world_size() == 1:
        return list(rows)
    parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(rows, parts, dst=0, group=group)
    return None if parts is None else [row for part in parts for row in part]


def gather_everywhere(rows: list[Any]) -> list[Any]:
    """Rows of all ranks in rank order, on every rank. Rows must pickle."""
    if world_size() == 1:
        return list(rows)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def on_rank0(function: Callable[[], T], group: Any = None) -> T:
    """Run `function` on rank 0 only and return what it returned on every rank. Collective.

    Messages go over `group`, of all ranks, by default that of the run.

    A failure of rank 0 is raised on all ranks, so that none of them waits in the next collective for a rank that left.

    Raises:
        AgreedBadInput: on every rank, if `function` raised BadInput, or could not write or read a file (disk full, no
            permission).
        RuntimeError: on the other ranks, naming any other exception of rank 0, which keeps its own there.
    """
    outcome: list = [None, None, None]
    error: Exception | None = None
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as raised:  # noqa: BLE001 - every failure must reach the other ranks
            error = _agreed(raised)
            bad_input = isinstance(error, BadInput)
            outcome[1:] = [bad_input, str(error) if bad_input else f"{type(error).__name__}: {error}"]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise AgreedBadInput(outcome[2]) if outcome[1] else RuntimeError(f"rank 0 failed: {outcome[2]}")
    return outcome[0]


def _agreed(raised: Exception) -> Exception:
    """`raised`, or in place of bad input what says that all ranks learn of it."""
    if reason := cannot_write(raised):
        agreed = AgreedBadInput(f"{raised.filename or 'a file of this command'}: {reason}")
    elif isinstance(raised, BadInput):
        agreed = AgreedBadInput(str(raised))
    else:
        return raised
    agreed.__cause__ = raised
    return agreed
