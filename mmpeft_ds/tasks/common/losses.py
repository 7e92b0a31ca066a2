"""Sums of losses over the texts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sum(losses_T: Tensor, weights_T: Tensor) -> Tensor:
    """Sum of weight times loss, in the dtype of the losses; what has weight 0 is absent even if it is not finite."""
    # where, not a product: 0 * nan is nan
    return torch.where(weights_T > 0, losses_T * weights_T.to(losses_T.dtype), torch.zeros_like(losses_T)).sum()
