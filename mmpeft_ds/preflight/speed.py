"""Time of all-gathers within a node and across nodes, and of the way from each node to the next."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

SIZES = (1 << 10, 32 << 10, 1 << 20, 16 << 20, 64 << 20)  # bytes that every rank holds after the all-gather
REPETITIONS = 5  # after one that does not count; the median of them
LONG = 1.0  # seconds; what takes longer is not repeated, and larger sizes are left out
LINK = 4 << 20  # bytes from one node to the next and back


def measure(
    store: dist.Store, rank: int, nodes: Sequence[Sequence[int]], device: torch.device, patience: float
) -> dict[str, Any]:
    """Measure all-gathers and ways between nodes. Collective over the ranks of all nodes.

    Args:
        store: where the ranks meet.
        nodes: ranks of each node, the first of which speaks for it across nodes.
        patience: seconds of one collective.

    Returns:
        of this rank: `within` and `across`, seconds for each of `SIZES` or the first few of them, empty where it has
        no part in them, and `links`, seconds of `LINK` bytes to the first rank of another node, by that rank; or
        `error`, why nothing could be measured.
    """
    cuda = device.type == "cuda"
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # an error when the time is up; torch would end the process
    world = sum(map(len, nodes))
    wait = datetime.timedelta(seconds=patience)
    try:
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
        try:
            return _all(rank, nodes, device, wait)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:  # dist.DistError is one
        return {"error": str(error).splitlines()[0][:300]}


def _all(rank: int, nodes: Sequence[Sequence[int]], device: torch.device, wait: datetime.timedelta) -> dict[str, Any]:
    own = [dist.new_group(list(ranks), timeout=wait) for ranks in nodes]  # every rank makes every group
    leaders = [ranks[0] for ranks in nodes]
    between = dist.new_group(leaders, timeout=wait)
    mine = next(i for i, ranks in enumerate(nodes) if rank in ranks)
    seconds: dict[str, Any] = {"within": [], "across": [], "links": {}}
    if len(nodes[mine]) > 1:
        seconds["within"] = all_gathers(own[mine], device)
    dist.barrier()
    if rank in leaders and len(leaders) > 1:
        seconds["across"] = all_gathers(between, device)
        if len(leaders) > 2:  # between two there is one way, which the all-gather has measured
            seconds["links"] = links(rank, leaders, device)
    dist.barrier()
    return seconds


def all_gathers(group: Any, device: torch.device) -> list[float]:
    """Seconds of an all-gather of each of `SIZES`, up to the first that takes longer than `LONG`. Collective over
    `group`."""
    ranks, first, times = dist.get_world_size(group), dist.get_global_rank(group, 0), []

    def agree(seconds: torch.Tensor) -> None:
        dist.broadcast(seconds, first, group=group)

    for size in SIZES:
        part = torch.zeros(max(1, size // ranks), dtype=torch.uint8, device=device)
        whole = torch.empty(len(part) * ranks, dtype=torch.uint8, device=device)
        call = partial(dist.all_gather_into_tensor, whole, part, group=group)
        times.append(_median(call, agree, device))
        if times[-1] > LONG:
            break
    return times


def links(rank: int, leaders: Sequence[int], device: torch.device) -> dict[str, float]:
    """Seconds of `LINK` bytes between the first ranks of neighbouring nodes, in a ring. Collective over `leaders`."""
    count, seconds = len(leaders), {}
    data = torch.zeros(LINK, dtype=torch.uint8, device=device)
    # Every other way at a time, so that the time does not grow with the nodes.
    for i in [*range(0, count - 1, 2), *range(1, count - 1, 2), count - 1]:
        one, other = leaders[i], leaders[(i + 1) % count]
        if rank in (one, other):
            there, first = (other, True) if rank == one else (one, False)
            agree = partial(_one_way, there=there, sends=first)
            seconds[str(there)] = _median(partial(_to_and_back, data, there, first), agree, device) / 2
    return seconds


def _to_and_back(data: torch.Tensor, there: int, first: bool) -> None:
    _one_way(data, there, first)
    _one_way(data, there, not first)


def _one_way(data: torch.Tensor, there: int, sends: bool) -> None:
    dist.send(data, there) if sends else dist.recv(data, there)


def _median(call: Callable[[], Any], agree: Callable[[torch.Tensor], None], device: torch.device) -> float:
    """Seconds of a collective, waited for on a GPU: the median of `REPETITIONS` calls after one that does not count,
    or that one alone where it takes longer than `LONG`; the same on all ranks that call it.

    Args:
        agree: lets all of these ranks have the number of one of them.
    """
    once = torch.tensor([_seconds(call, device)], dtype=torch.float64, device=device)
    agree(once)
    if float(once) <= LONG:
        once.fill_(statistics.median(_seconds(call, device) for _ in range(REPETITIONS)))
        agree(once)
    return float(once)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bandwidth(seconds: float, size: int, ranks: int) -> float:
    """Bytes a second that each rank receives in an all-gather of `size` bytes in all."""
    return size * (ranks - 1) / ranks / max(seconds, 1e-9)
