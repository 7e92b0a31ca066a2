"""Limit on the bad samples of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpeft_ds.data.batch import PackedBatch


class BadBudget:
    """Counts bad samples and tells when there are too many. Every rank counts its own; merged counts are those of all.

    Args:
        max_fraction: allowed share of bad samples among those of an epoch or those read, whichever are more; rounded
            up, so that 0 allows none and any other value at least one per epoch.
        max_in_a_row: number of bad samples since the last good one that stops the run, summed over ranks.
        num_samples: samples of an epoch, see `Stream.num_samples`.
    """

    LISTED = 20

    def __init__(self, max_fraction: float, max_in_a_row: int, num_samples: int = 0):
        self.max_fraction, self.max_in_a_row, self.num_samples = max_fraction, max_in_a_row, num_samples
        self.seen, self.bad, self.in_a_row = 0, 0, 0
        self.counts: dict[str, int] = {}
        self.listed: list[tuple[str, str, str]] = []

    def feed(self, batch: PackedBatch) -> None:
        """Count one micro-batch of this rank, but for its padding."""
        for sample_id, weight in zip(batch.sample_id, batch.weight.tolist(), strict=True):
            self.seen += bool(sample_id)
            self.in_a_row = 0 if weight > 0 else self.in_a_row + bool(sample_id)
        self.bad += len(batch.bad)
        for kind, _, _ in batch.bad:
            self.counts[kind] = self.counts.get(kind, 0) + 1
        self.listed = [*self.listed, *map(tuple, batch.bad)][: self.LISTED]

    def state(self) -> dict[str, Any]:
        """The counts as plain data, for other ranks and for checkpoints."""
        names = ("seen", "bad", "in_a_row", "counts", "listed")
        return {name: getattr(self, name) for name in names}

    def merged(self, states: Sequence[dict[str, Any]]) -> BadBudget:
        """A budget with the same limits and the sum of the counts of `states`."""
        total = BadBudget(self.max_fraction, self.max_in_a_row, self.num_samples)
        for state in states:
            total.seen, total.bad = total.seen + state["seen"], total.bad + state["bad"]
            total.in_a_row += state["in_a_row"]
            for kind, count in state["counts"].items():
                total.counts[kind] = total.counts.get(kind, 0) + count
            total.listed = [*total.listed, *map(tuple, state["listed"])][: self.LISTED]
        return total

    def problem(self) -> str | None:
        """One line if the run must stop, with the first bad samples; None while within the budget."""
        allowed = int(np.ceil(self.max_fraction * max(self.seen, self.num_samples)))
        if self.num_samples:  # the one that a small data set may have is met again in every epoch
            epochs = -(-self.seen // self.num_samples)
            allowed = max(allowed, epochs * int(np.ceil(self.max_fraction * self.num_samples)))
        if self.bad <= allowed and self.in_a_row < self.max_in_a_row:
            return None
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        samples = "; ".join(f"{shard} {key} ({kind})" for kind, shard, key in self.listed)
        more = f" and {self.bad - len(self.listed)} more" if self.bad > len(self.listed) else ""
        return (
            f"{self.bad} bad of {self.seen} samples read ({kinds}), {self.in_a_row} in a row: {samples}{more}. Mend "
            f"the data, or raise data.max_bad_fraction ({self.max_fraction}) or data.max_bad_in_a_row "
            f"({self.max_in_a_row})."
        )
