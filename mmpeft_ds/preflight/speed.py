"""Time of all-gathers within a node and across nodes, and of the way from each node to the next."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

SIZES = (1 << 10, 32 << 10, 1 << 20, 16 << 20, 64 << 20)  # bytes that every rank holds after the all-gather
REPETITIONS = 5  # after one that does not count; the median of them
LINK = 4 << 20  # bytes from one node to the next and back


def measure(
    store: dist.Store, rank: int, nodes: Sequence[Sequence[int]], device: torch.device, patience: float
) -> dict[str, Any]:
    """Measure all pairs of what is asked. Collective over the ranks of all nodes.

    Args:
        store: where the ranks meet.
        nodes: ranks of each node, the first of which speaks for it across nodes.
        patience: seconds of one collective.

    Returns:
        of this rank: `within` and `across`, lists of seconds in the order of `SIZES`, empty where it has no part in
        them, and `links`, seconds of `LINK` bytes to the first rank of another node, by that rank; or `error`.
    """
    cuda = device.type == "cuda"
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
    found: dict[str, Any] = {"within": [], "across": [], "links": {}}
    if len(nodes[mine]) > 1:
        found["within"] = all_gathers(own[mine], device)
    dist.barrier()
    if rank in leaders and len(leaders) > 1:
        found["across"] = all_gathers(between, device)
        if len(leaders) > 2:  # between two there is one way, which the all-gather has measured
            found["links"] = links(rank, leaders, device)
    dist.barrier()
    return found


def all_gathers(group: Any, device: torch.device) -> list[float]:
    """Seconds of an all-gather of each of `SIZES`. Collective over `group`."""
    ranks, found = dist.get_world_size(group), []
    for size in SIZES:
        part = torch.zeros(max(1, size // ranks), dtype=torch.uint8, device=device)
        whole = torch.empty(len(part) * ranks, dtype=torch.uint8, device=device)
        found.append(_median(lambda p=part, w=whole: dist.all_gather_into_tensor(w, p, group=group), device))
    return found


def links(rank: int, leaders: Sequence[int], device: torch.device) -> dict[str, float]:
    """Seconds of `LINK` bytes between the first ranks of neighbouring nodes, in a ring. Collective over `leaders`."""
    count, found = len(leaders), {}
    data = torch.zeros(LINK, dtype=torch.uint8, device=device)
    # Every other way at a time, so that the time does not grow with the nodes.
    for i in [*range(0, count - 1, 2), *range(1, count - 1, 2), count - 1]:
        one, other = leaders[i], leaders[(i + 1) % count]
        if rank in (one, other):
            there = other if rank == one else one
            found[str(there)] = _median(lambda t=there, first=rank == one: _to_and_back(data, t, first), device) / 2
    return found


def _to_and_back(data: torch.Tensor, there: int, first: bool) -> None:
    for sends in (first, not first):
        dist.send(data, there) if sends else dist.recv(data, there)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a collective, waited for on a GPU."""
    times = []
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def bandwidth(seconds: float, size: int, ranks: int) -> float:
    """Bytes a second that each rank receives in an all-gather of `size` bytes in all."""
    return size * (ranks - 1) / ranks / max(seconds, 1e-9)
