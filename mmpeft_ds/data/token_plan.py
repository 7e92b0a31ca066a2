"""Assignment of a step's samples to micro-batches by their tokens: a pure function of the samples.

The samples of a step are given. They are put into micro-batches of at most `budget` tokens, few of them and as many
on every rank, so that all ranks cost about the same in every micro-step. Nothing is padded; a rank with less to do
waits for the slowest one. Samples stay on the rank whose slots they are of, which reads its own stretch of the data,
but for the few that would make it slower than the others.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIT = 1024  # costs of a token in the language model, see `Lengths.costs`
NEAR = 1.01  # of the mean cost of a micro-batch: up to it samples stay on their rank
UNEVEN = 1.05  # largest micro-batch, over the mean, from which on a plan that moves all samples is tried
BETTER = 0.98  # what its largest micro-batch must be of the other's


@dataclass(frozen=True)
class Lengths:
    """Token counts of all used samples of a source, in the order of its shards.

    Attributes:
        tokens: (samples,) int, which the language model reads.
        costs: (samples,) int64, of computing them, in UNIT-ths of a token's. Whole numbers, so that all ranks plan
            alike whatever their processors do to the last bit.
    """

    tokens: np.ndarray
    costs: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """Expected properties of steps, as means over steps.

    Attributes:
        micro_steps: micro-batches of each rank in a step.
        row: tokens of a micro-batch.
        slowest: cost of the slowest rank in a step, over that of the median rank.
        slowest_in_order: the same where ranks take the samples in their order.
        waiting: share of the time that ranks wait for the slowest one, if they meet in every micro-step.
        padded: share of padding where as many micro-batches are made of the samples in their order, in padded rows.
        moved: share of the samples that another rank takes than the one whose slots they are of.
    """

    micro_steps: float
    row: float
    slowest: float
    slowest_in_order: float
    waiting: float
    padded: float
    moved: float


def forecast(lengths: Lengths, budget: int, slots: int, ranks: int, steps: int = 20) -> Forecast:
    """Forecast of steps of `slots` samples each, drawn from those of `lengths` with a fixed seed."""
    draw = random.Random(0)
    tokens, costs = lengths.tokens.tolist(), lengths.costs.tolist()
    of_steps: list[tuple[float, ...]] = []
    for _ in range(steps if tokens else 0):
        chosen = draw.choices(range(len(tokens)), k=slots)
        own, paid = [tokens[i] for i in chosen], [costs[i] for i in chosen]
        plan = micro_batches(own, paid, budget, ranks)
        of_ranks = costs_of_ranks(plan, paid)
        in_order = [sum(paid[r * slots // ranks : (r + 1) * slots // ranks]) for r in range(ranks)]
        rows = sum(map(bool, (batch for step in plan for batch in step)))
        cut = [own[i * slots // rows : (i + 1) * slots // rows] for i in range(rows)]
        places = sum(len(part) * max(part) for part in cut if part)
        together = ranks * sum(max(sum(paid[i] for i in batch) for batch in step) for step in plan)
        waiting = max(0.0, 1 - sum(paid) / (together or 1.0))
        padded = 1 - sum(own) / (places or 1)
        homes = homes_of(range(slots), slots, ranks)
        moved = sum(homes[i] != rank for step in plan for rank, batch in enumerate(step) for i in batch) / slots
        of_steps.append((len(plan), sum(own) / rows, slowest(of_ranks), slowest(in_order), waiting, padded, moved))
    return Forecast(*(statistics.fmean(values) for values in zip(*of_steps, strict=True)))


def costs_of_ranks(plan: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> list[float]:
    """Cost of each rank in a step, of a plan as `micro_batches` makes it."""
    return [sum(costs[i] for batch in batches for i in batch) for batches in zip(*plan, strict=True)]


def slowest(costs: Sequence[float]) -> float:
    """The highest cost of a rank over the median one."""
    middle = statistics.median(costs) or statistics.fmean(costs) or 1.0  # most ranks may have nothing
    return max(costs) / middle


def homes_of(slots: Sequence[int], total: int, ranks: int) -> list[int]:
    """The rank whose slots these are, of `total` slots, as `order.micro_slots` deals them out."""
    ends = [(rank + 1) * total // ranks for rank in range(ranks)]
    return np.searchsorted(ends, np.asarray(slots, np.int64), side="right").tolist()


def micro_batches(
    tokens: Sequence[int], costs: Sequence[int], budget: int, ranks: int, homes: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Samples of each micro-batch.

    The longest processing time rule (Graham 1969): the samples, from the costliest on, go where least is yet, among
    the micro-batches of their own rank that have room and stay below about the mean; those that are left then do so
    among the micro-batches of all ranks. Where that is uneven, since there are few samples, all of them go where least
    is yet, if that is better.

    Args:
        tokens: of each sample. One of more than `budget` has a micro-batch to itself.
        costs: of each sample, >= 0, in any unit.
        budget: tokens of a micro-batch.
        ranks: number of ranks.
        homes: rank of each sample; None: they are dealt out in their order.

    Returns:
        [micro-step][rank] -> numbers of samples, ascending, perhaps none; at least one micro-step.
    """
    homes = homes_of(range(len(tokens)), len(tokens), ranks) if homes is None else homes
    samples = _Samples(tokens, costs, budget, sorted(range(len(tokens)), key=lambda i: (-costs[i], -tokens[i], i)))
    steps = max(1, -(-sum(min(t, budget) for t in tokens) // (budget * ranks)))
    while True:
        near = _Filling.near(samples, ranks, steps, homes)
        if near is not None and near.largest * ranks * steps <= UNEVEN * sum(costs):
            return near.by_rank(ranks)
        anywhere = _Filling.anywhere(samples, ranks * steps)
        if anywhere is not None and (near is None or anywhere.largest < BETTER * near.largest):
            return anywhere.by_cost(ranks)
        if near is not None:
            return near.by_rank(ranks)
        steps += 1


@dataclass(frozen=True)
class _Samples:
    tokens: Sequence[int]
    costs: Sequence[int]
    budget: int
    order: Sequence[int]  # the costliest first


class _Filling:
    """Micro-batches that are being filled."""

    def __init__(self, samples: _Samples, batches: int):
        self.samples, self.filled = samples, [[] for _ in range(batches)]
        self.used, self.cost = [0] * batches, [0] * batches

    @property
    def largest(self) -> float:
        return max(self.cost)

    def has_room(self, batch: int, i: int) -> bool:
        return not self.used[batch] or self.used[batch] + self.samples.tokens[i] <= self.samples.budget

    def put(self, batch: int, i: int) -> None:
        self.filled[batch].append(i)
        self.used[batch] += max(1, self.samples.tokens[i])
        self.cost[batch] += self.samples.costs[i]

    @classmethod
    def near(cls, samples: _Samples, ranks: int, steps: int, homes: Sequence[int]) -> _Filling | None:
        """Samples on their ranks as far as that is even; None if one has room nowhere."""
        filling = cls(samples, ranks * steps)
        limit, rest = NEAR * sum(samples.costs) / (ranks * steps), []
        for i in samples.order:
            own = range(homes[i] * steps, (homes[i] + 1) * steps)
            batch = min(own, key=filling.cost.__getitem__)
            fits = not filling.cost[batch] or filling.cost[batch] + samples.costs[i] <= limit
            if fits and filling.has_room(batch, i):
                filling.put(batch, i)
            else:
                rest.append(i)
        return filling if filling.spread(rest) else None

    @classmethod
    def anywhere(cls, samples: _Samples, batches: int) -> _Filling | None:
        """Every sample where least is yet; None if one has room nowhere."""
        filling = cls(samples, batches)
        return filling if filling.spread(samples.order) else None

    def spread(self, order: Sequence[int]) -> bool:
        """Put samples where least is yet and there is room; False if one has room nowhere."""
        heap = [(cost, batch) for batch, cost in enumerate(self.cost)]
        heapq.heapify(heap)
        for i in order:
            full = []
            while heap and not self.has_room(heap[0][1], i):
                full.append(heapq.heappop(heap))
            if not heap:
                return False
            _, batch = heapq.heappop(heap)
            self.put(batch, i)
            for entry in (*full, (self.cost[batch], batch)):
                heapq.heappush(heap, entry)
        return True

    def by_rank(self, ranks: int) -> list[list[list[int]]]:
        """[micro-step][rank] of batches that belong to ranks; the costliest of each rank meet in a micro-step."""
        steps = len(self.filled) // ranks
        of_ranks = [self._sorted(range(rank * steps, (rank + 1) * steps)) for rank in range(ranks)]
        return [[sorted(self.filled[batches[step]]) for batches in of_ranks] for step in range(steps)]

    def by_cost(self, ranks: int) -> list[list[list[int]]]:
        """[micro-step][rank], batches of like cost in a micro-step."""
        chosen = [sorted(self.filled[batch]) for batch in self._sorted(range(len(self.filled)))]
        rows = [chosen[first : first + ranks] for first in range(0, len(chosen), ranks)]
        # Every other one the other way round, so that no rank has the larger one each time.
        return [row if step % 2 == 0 else row[::-1] for step, row in enumerate(rows)]

    def _sorted(self, batches: Sequence[int]) -> list[int]:
        return sorted(batches, key=lambda batch: (-self.cost[batch], batch))
