"""Parts of a fused projection: what an adapter adds to some of its output features, and to its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def spread(pieces: Sequence[Tensor], parts: Sequence[tuple[int, int]], out_features: int) -> Tensor:
    """Each piece at its output features, zeros elsewhere.

    Args:
        pieces: (..., width) of each part.
        parts: (first output feature, width) of each.

    Returns:
        (..., out_features).
    """
    columns, at = [], 0
    like = pieces[0]
    for (start, width), piece in sorted(zip(parts, pieces, strict=True), key=lambda pair: pair[0]):
        if start > at:
            columns.append(like.new_zeros(1).expand(*like.shape[:-1], start - at))
        columns.append(piece)
        at = start + width
    if at < out_features:
        columns.append(like.new_zeros(1).expand(*like.shape[:-1], out_features - at))
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


@torch.no_grad()
def fold(base: nn.Module, parts: Sequence[tuple[int, int]], changes: Sequence[Tensor]) -> None:
    """Add the change of each part, (width, in), to the weight of a Linear or Conv1D, in place."""
    whole = base.weight.T if type(base).__name__ == "Conv1D" else base.weight
    for (start, width), change in zip(parts, changes, strict=True):
        whole[start : start + width] += change.to(whole.dtype)
