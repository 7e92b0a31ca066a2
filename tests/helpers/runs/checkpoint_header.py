"""What `state.json` of a checkpoint holds, for tests that write checkpoints without training."""

import dataclasses
from typing import Any

from mmpeft_ds.engine.train_state import TrainState


def header(**state: Any) -> dict[str, Any]:
    """A complete one, with these values of the train state."""
    return {"format": 1, "optimizer": "adamw", "optimizer_step": 2, "state": dataclasses.asdict(TrainState(**state))}
