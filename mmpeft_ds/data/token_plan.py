"""Which samples of a step stand in which micro-batch, by their tokens: a pure function of the step's samples.

The samples of a step are given. They are put into micro-batches of at most `budget` tokens, few of them and as many
on every rank, so that all ranks cost about the same in every micro-step. Nothing is padded; a rank with less to do
waits for the slowest one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


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
