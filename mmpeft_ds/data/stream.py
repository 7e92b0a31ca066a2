"""Streams of packed batches from prepared data sets: the same global batches for any number of ranks and workers.

The order is a pure function (see order.py). So a resume starts at its step without reading anything before it, and a
worker needs only the slots and the step of the batch to make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.frozen_store import StoreSpec
from mmpeft_ds.data.loader import Loader, Request
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.stream_source import StreamSource
from mmpeft_ds.data.token_plan import Lengths, costs_of_ranks, homes_of, micro_batches, slowest
from mmpeft_ds.data.workers import WorkerPool
from mmpeft_ds.errors import BadInput

PLANNED = 256  # plans of steps that are kept, more than workers prepare ahead


@dataclass
class Step:
    """The batches of one rank for one optimizer step.

    Attributes:
        source: index of the source (so of the task).
        step: step of the epoch.
        micro: one batch per accumulation step, as many on every rank. They have equally many slots, of which some may
            hold no sample, or, where micro-batches are planned by tokens, whatever has room.
        imbalance: planned cost of the slowest rank over that of the median one; None where nothing was planned.
    """

    source: int
    step: int
    micro: list[PackedBatch] = field(default_factory=list)
    imbalance: float | None = None


class Stream:
    """The epochs of one rank.

    Args:
        sources: at least one; each step takes all its slots from one of them. In evaluation each rank takes a step of
            its own, with all its slots, unless samples are coupled: batches then do not depend on the ranks.
        options: `global_batch` slots per step, workers, shuffling, limits.
        rank, world_size: this rank; the global batch does not depend on them.
        accumulation: micro-batches per step.
        seed: of order, augmentation and choices.
        train: shuffle and follow `last_batch`; otherwise take every sample exactly once, in the same order and with
            the random choices of epoch 0 in every epoch.
        coupled: predictions of a sample depend on the others of its batch, see `options.evaluation_order`.
        pin_memory: put batches into pinned memory, from which a GPU copies asynchronously.
        lengths: of each source. Micro-batches are then planned by them, of at most `options.pack` tokens, and read
            without padding; `accumulation` is not read.

    Raises:
        BadInput: no source, an unknown split, a `pipe:` URL that is not allowed, or an epoch without a step.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        options: DataOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        train: bool = True,
        coupled: bool = False,
        pin_memory: bool = False,
        lengths: Sequence[Lengths] = (),
    ):
        if not sources:
            raise BadInput("data.sources: empty. Name at least one prepared data set.")
        last_batch = options.last_batch if train else "pad"
        self.loader = Loader(sources, options, seed, train, coupled)
        self.slots = self.loader.slots
        self.whole = not train and not coupled
        share = (0, 1) if self.whole else (rank, world_size)
        self.micro_slots = list(map(tuple, order.micro_slots(self.slots, *share, accumulation)))
        self.sizes = [s.samples for s in sources]
        steps = [order.steps_of(n, self.slots, last_batch) for n in self.sizes]
        if self.whole:
            steps = [order.ceil(count, world_size) for count in steps]
        for source, n, count in zip(sources, self.sizes, steps, strict=True):
            if count == 0:
                raise BadInput(
                    f"{source.manifest.dir}: split {source.split!r} has {n} samples, fewer than data.global_batch "
                    f"{self.slots}. Use a smaller batch, or data.last_batch: pad."
                )
        self.mix = order.Mix(steps, [s.weight if train else 1.0 for s in sources], seed)
        self.lengths, self.budget, self.rank, self.world_size = lengths, options.pack, rank, world_size
        self._planned: dict[order.Visit, tuple[list[list[int | None]], float]] = {}
        self._frozen: StoreSpec | None = None
        self._pool = WorkerPool(self.loader, options.workers, options.prefetch, pin_memory)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together, on all ranks."""
        return sum(self.sizes)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of an epoch, equal on all ranks."""
        return self.mix.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """Steps of an epoch from `start_step` on; nothing before it is read.

        Only one epoch of a stream can be open: starting another ends the earlier one.

        Raises:
            BadInput: if a shard is missing or unreachable.
        """
        made = self._pool.run(self._requests(epoch, start_step))
        for step in range(start_step, self.mix.steps):
            visit = self.mix.at(epoch, step)
            batches = [next(made) for _ in self._micro_slots(visit)]
            yield Step(visit.source, step, batches, self._plan_of(visit)[1] if self.lengths else None)

    def keep_frozen(self, spec: StoreSpec | None) -> None:
        """From the next epoch on do not decode images whose values are stored, and say of the others where they
        belong."""
        self._frozen = spec

    def wait_for_workers(self) -> None:
        """Return when all workers run. It is never needed: until then this process makes the batches."""
        self._pool.wait()

    def close(self) -> None:
        """End the workers; the stream cannot be used afterwards."""
        self._pool.close()
        self.loader.close()

    def _requests(self, epoch: int, start_step: int) -> Iterator[Request]:
        for step in range(start_step, self.mix.steps):
            visit = self.mix.at(epoch, step)
            mine = replace(visit, step=visit.step * self.world_size + self.rank) if self.whole else visit
            for slots in self._micro_slots(visit):
                yield Request(mine, tuple(slots), bool(self.lengths), self._frozen)

    def micro_steps(self, epoch: int, step: int) -> int:
        """Micro-batches of each rank at a step."""
        return len(self._micro_slots(self.mix.at(epoch, step)))

    def plan(self, visit: order.Visit) -> tuple[list[list[list[int]]], float]:
        """Slots of each micro-batch, [micro-step][rank], where they are planned by tokens, and the cost of the slowest
        rank over that of the median one."""
        numbers = self.loader.numbers(visit)
        filled = np.flatnonzero(numbers >= 0)
        tokens, costs = (
            values[numbers[filled]].tolist()
            for values in (self.lengths[visit.source].tokens, self.lengths[visit.source].costs)
        )
        homes = homes_of(filled, self.slots, self.world_size)
        planned = micro_batches(tokens, costs, self.budget, self.world_size, homes)
        slots = [[filled[batch].tolist() for batch in step] for step in planned]
        return slots, slowest(costs_of_ranks(planned, costs))

    def _micro_slots(self, visit: order.Visit) -> Sequence[Sequence[int | None]]:
        """Slots of this rank's micro-batches at a visit."""
        return self._plan_of(visit)[0] if self.lengths else self.micro_slots

    def _plan_of(self, visit: order.Visit) -> tuple[list[list[int | None]], float]:
        """Slots of this rank's micro-batches, and the imbalance of all ranks."""
        if visit not in self._planned:  # asked for twice: when it is requested, and when it is handed out
            planned, imbalance = self.plan(visit)
            self._planned[visit] = [step[self.rank] or [None] for step in planned], imbalance
            while len(self._planned) > PLANNED:
                self._planned.pop(next(iter(self._planned)))
        return self._planned[visit]
