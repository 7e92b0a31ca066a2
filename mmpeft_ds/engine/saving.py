"""What a save in the background does beside the checkpoint: counts of all ranks, and curves on disk before it."""

from __future__ import annotations

import copy
import functools
from typing import Any

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.distributed.collectives import rank
from mmpeft_ds.engine.checkpoint import Late
from mmpeft_ds.engine.monitor import Observer
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.errors import BadInput


def late(budget: BadBudget, run_dir: RunDir, observer: Observer) -> Late:
    """The work left to the background, from what is known now. Not collective.

    The checkpoint is not written where the directory is not this run's any more, or where its curves cannot be.

    Args:
        budget: of this rank, which counts on.
    """
    counts, waits = copy.deepcopy(budget), []
    if rank() == 0:
        try:
            run_dir.keep()
            waits.append(observer.flush())
        except (BadInput, OSError) as error:
            waits.append(functools.partial(_raise, error))

    def complete(state: dict[str, Any], of_ranks: list[Any]) -> None:
        state["extra"]["bad_budget"] = counts.merged(of_ranks).state()
        for wait in waits:
            wait()

    return Late(counts.state(), complete)


def _raise(error: Exception) -> None:
    raise error
