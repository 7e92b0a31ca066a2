"""The state of training that a checkpoint holds beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """State of training after an optimizer step.

    Attributes:
        epoch: epoch in progress, from 0.
        step: optimizer steps done in total.
        step_in_epoch: optimizer steps done in this epoch; with epoch and global_batch the position in the data.
        global_batch: slots of a step.
        best: best value of the main metric, None before the first evaluation.
        best_step: step at which it was reached; of equal values, that of the lowest validation loss.
        evaluations_without_improvement: for early stopping.
        skipped_in_a_row: steps skipped for a non-finite loss or gradient since the last good one.
        skipped_total: skipped steps of the whole run.
        bad: kind -> number of bad samples.
        cut_texts: kind -> number of texts that were cut to fit.
        control_tokens: number of texts with control tokens, which were read as words.
        elapsed: seconds of training over all starts of the run.
        extra: further JSON-able state of the engine, such as the budget of bad samples.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    global_batch: int = 0
    best: float | None = None
    best_step: int = 0
    evaluations_without_improvement: int = 0
    skipped_in_a_row: int = 0
    skipped_total: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    cut_texts: dict[str, int] = field(default_factory=dict)
    control_tokens: int = 0
    elapsed: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
