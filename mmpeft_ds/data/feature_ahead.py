"""Micro-batches of feature shards that are gathered before they are asked for.

Each operation on arrays then serves many of them, and each shard is checked once for all. What is gathered is a copy,
so a shard that changes afterwards does not change it; that is noticed with the next ones.
"""

# K micro-batches, S slots of each

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.feature_batches import Ahead, FeatureBatches

SAMPLES = 4096  # gathered at a time, at most; 12 MiB of 1,536 numbers of 16 bits. With more, nothing is gained

Slots = tuple[int | None, ...]


class Lookahead:
    """The coming micro-batches of one source, for a process that is asked for them at a constant distance of steps.

    That is 1 in a rank without workers, and n in each of n workers.
    """

    def __init__(self, gather: FeatureBatches):
        self.gather = gather
        self._asked: tuple[int, Slots, int] | None = None
        self._coming: deque[tuple[int, Slots, int]] = deque()
        self._ahead: Ahead | None = None
        self._samples = SAMPLES  # gathered next time
        self._pause = 0  # calls until another attempt, after one that met something unusual

    def take(
        self, epoch: int, slots: Slots, step: int, full: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    ) -> PackedBatch | None:
        """The micro-batch of a step; None if it has to be made alone.

        Args:
            slots: none of them None.
            full: (K,) steps -> shards and samples, (K', S) each, of those before the first with an empty slot.

        Raises:
            BadInput: if a shard of the coming micro-batches is missing, or has changed.
        """
        asked, before = (epoch, slots, step), self._asked
        self._asked = asked
        if not self._coming or self._coming[0] != asked:
            # One of several sources comes to one of several workers at changing distances: little is made in vain.
            self._samples = min(SAMPLES, 2 * (len(slots) if self._coming else self._samples))
            self._coming.clear()
            self._pause -= 1
            if before is None or before[:2] != asked[:2] or step <= before[2] or self._pause > 0:
                return None
            self._look(epoch, slots, step + (step - before[2]) * np.arange(self._samples // len(slots)), full)
        if not self._coming:
            return None
        number = len(self._ahead.hashes) - len(self._coming)
        self._coming.popleft()
        return self.gather.batch(self._ahead, number)

    def _look(
        self,
        epoch: int,
        slots: Slots,
        steps: np.ndarray,
        full: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    ) -> None:
        if len(steps) < 2:
            return
        shards, samples = full(steps)
        self._ahead = self.gather.ahead(epoch, shards.ravel(), samples.ravel(), len(slots)) if len(shards) else None
        if self._ahead is None:
            self._pause = max(1, len(shards))
            return
        self._coming.extend((epoch, slots, step) for step in steps[: len(shards)].tolist())
