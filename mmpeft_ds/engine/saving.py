"""What belongs to a save beside the checkpoint: of one in the background the counts of all ranks, and curves on disk
before it; the best evaluation until its checkpoint is written."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.distributed.collectives import rank
from mmpeft_ds.engine.checkpoint import Late
from mmpeft_ds.engine.monitor import Observer
from mmpeft_ds.engine.rundir import RunDir
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.errors import BadInput

_BEST = ("best", "best_step", "evaluations_without_improvement")  # of TrainState
_BEST_EXTRA = ("best_scores", "best_counted")


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


@dataclass(frozen=True)
class Unpointed:
    """The best evaluation, until the pointer `best` names its checkpoint.

    A checkpoint that says which step is the best, without that pointer, would have another step's weights exported.

    Attributes:
        step: of the run when it was evaluated.
        fields, extra: what TrainState held of the best before.
    """

    step: int
    fields: dict[str, Any]
    extra: dict[str, Any]

    @classmethod
    def before(cls, state: TrainState) -> Unpointed:
        """Remember the best of a state, which is about to change."""
        extra = {key: state.extra[key] for key in _BEST_EXTRA if key in state.extra}
        return cls(state.step, {name: getattr(state, name) for name in _BEST}, extra)

    def retried(self, state: TrainState, lost: bool, saved_at: int) -> bool:
        """Whether the save that follows a failure is that of the best. Where the training has gone on since, the
        weights are gone, and the state has the best of before again.

        Args:
            lost: the newest checkpoint could not be written.
            saved_at: its step.
        """
        if self.step == state.step:
            return lost or saved_at != state.step
        if lost:
            for name, value in self.fields.items():
                setattr(state, name, value)
            state.evaluations_without_improvement += 1
            for key in _BEST_EXTRA:
                state.extra.pop(key, None)
            state.extra |= self.extra
        return False
