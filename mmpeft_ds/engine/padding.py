"""Share of padding in what the text tower computes."""

# T texts, S positions of each with padding

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.generation_output import GenerationOutput


def places(outputs: Any, batch: PackedBatch) -> tuple[int, Tensor]:
    """Positions that the text tower has computed, and how many of them hold a token of a text of weight above 0, an
    int64 scalar on the device. Zeros where that is not known.

    Args:
        outputs: what `BackboneBase.read` gave; a model that widens texts says how long they became.
        batch: as the model got it.
    """
    lengths, positions = None, 0
    if isinstance(outputs, GenerationOutput) and outputs.lengths is not None:
        lengths, positions = outputs.lengths, outputs.positions
    elif (mask := batch.texts.get("attention_mask")) is not None:
        lengths, positions = mask.sum(1), mask.numel()
    if lengths is None:
        return 0, torch.zeros((), dtype=torch.int64, device=batch.weight.device)
    return positions, (lengths * (batch.text_weight > 0)).sum()


def share(positions: float, read: float) -> dict[str, float]:
    """`padding`, the share of positions without such a token; empty where nothing was counted."""
    return {"padding": 1 - read / positions} if positions else {}
