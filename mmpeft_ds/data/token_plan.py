"""Which samples of a step stand in which micro-batch, by their tokens: a pure function of the step's samples.

The samples of a step are given. They are put into micro-batches of at most `budget` tokens, few of them and as many
on every rank, so that all ranks cost about the same in every micro-step. Nothing is padded; a rank with less to do
waits for the slowest one.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """Of all samples of a source that are used, in the order of its shards.

    Attributes:
        tokens: (samples,) int, which the language model reads.
        costs: (samples,) float, of computing them, in any unit.
    """

    tokens: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """What steps of some samples would be like, in the mean over steps.

    Attributes:
        micro_steps: micro-batches of each rank in a step.
        row: tokens of a micro-batch.
        slowest: cost of the slowest rank in a step, over that of the median rank.
        slowest_in_order: the same where ranks take the samples in their order.
        waiting: share of the time that ranks wait for the slowest one, if they meet in every micro-step.
        padded: share of padding where as many micro-batches are made of the samples in their order, in padded rows.
    """

    micro_steps: float
    row: float
    slowest: float
    slowest_in_order: float
    waiting: float
    padded: float


def forecast(lengths: Lengths, budget: int, slots: int, ranks: int, steps: int = 20) -> Forecast:
    """Forecast of steps of `slots` samples each, drawn from those of `lengths` with a fixed seed."""
    draw = random.Random(0)
    tokens, costs = lengths.tokens.tolist(), lengths.costs.tolist()
    found: list[tuple[float, ...]] = []
    for _ in range(steps if tokens else 0):
        chosen = draw.choices(range(len(tokens)), k=slots)
        own, paid = [tokens[i] for i in chosen], [costs[i] for i in chosen]
        plan = micro_batches(own, paid, budget, ranks)
        of_ranks = [sum(paid[i] for step in plan for i in step[rank]) for rank in range(ranks)]
        in_order = [sum(paid[r * slots // ranks : (r + 1) * slots // ranks]) for r in range(ranks)]
        rows = sum(map(bool, (batch for step in plan for batch in step)))
        cut = [own[i * slots // rows : (i + 1) * slots // rows] for i in range(rows)]
        places = sum(len(part) * max(part) for part in cut if part)
        together = ranks * sum(max(sum(paid[i] for i in batch) for batch in step) for step in plan)
        waiting = max(0.0, 1 - sum(paid) / (together or 1.0))
        padded = 1 - sum(own) / (places or 1)
        found.append((len(plan), sum(own) / rows, _slowest(of_ranks), _slowest(in_order), waiting, padded))
    return Forecast(*(statistics.fmean(values) for values in zip(*found, strict=True)))


def _slowest(costs: Sequence[float]) -> float:
    middle = statistics.median(costs) or statistics.fmean(costs) or 1.0  # most ranks may have nothing
    return max(costs) / middle


def micro_batches(tokens: Sequence[int], costs: Sequence[float], budget: int, ranks: int) -> list[list[list[int]]]:
    """Samples of each micro-batch.

    The longest processing time rule (Graham 1969): the samples, from the costliest on, each go where least is yet,
    among the micro-batches that have room. Micro-batches of like cost then make up a micro-step.

    Args:
        tokens: of each sample. One of more than `budget` has a micro-batch to itself.
        costs: of each sample, >= 0, in any unit.
        budget: tokens of a micro-batch.
        ranks: number of ranks.

    Returns:
        [micro-step][rank] -> numbers of samples, ascending, perhaps none; at least one micro-step.
    """
    longest_first = sorted(range(len(tokens)), key=lambda i: (-costs[i], -tokens[i], i))
    steps = max(1, -(-sum(min(t, budget) for t in tokens) // (budget * ranks)))
    while (filled := _filled(longest_first, tokens, costs, budget, steps * ranks)) is None:
        steps += 1
    filled.sort(key=lambda batch: (-sum(costs[i] for i in batch), batch))
    rows = [filled[step * ranks : (step + 1) * ranks] for step in range(steps)]
    # Every other one the other way round, so that no rank has the larger one each time.
    return [row if step % 2 == 0 else row[::-1] for step, row in enumerate(rows)]


def _filled(
    order: Sequence[int], tokens: Sequence[int], costs: Sequence[float], budget: int, batches: int
) -> list[list[int]] | None:
    """The samples in `batches` micro-batches; None if some sample has room in none."""
    filled: list[list[int]] = [[] for _ in range(batches)]
    used = [0] * batches
    heap = [(0.0, batch) for batch in range(batches)]  # by cost
    for i in order:
        full = []
        while heap and used[heap[0][1]] and used[heap[0][1]] + tokens[i] > budget:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, batch = heapq.heappop(heap)
        filled[batch].append(i)
        used[batch] += max(1, tokens[i])
        for entry in (*full, (cost + costs[i], batch)):
            heapq.heappush(heap, entry)
    return [sorted(batch) for batch in filled]
