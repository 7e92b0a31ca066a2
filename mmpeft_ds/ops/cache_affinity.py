"""Votes of a cache of labelled images, and the search of their weight and sharpness."""

# B queries, M cache rows, C classes, D feature width

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**24  # numbers of a (M, rows) block in the search: 64 MiB in float32


def votes(cosine_MB: Tensor, labels_M: Tensor, num_classes: int, sharpness: float | Tensor) -> Tensor:
    """(B, C) sums of exp(-sharpness (1 - cosine)) over the cache rows of each class; 0 for a class without rows.

    Args:
        cosine_MB: cosine of every cache row and every query, cache rows first.
        labels_M: class of each cache row, int64, in any order.
        sharpness: beta of the paper.

    Source: Tip-Adapter, arXiv 2111.03930, section 3.1.
    """
    order, starts = _by_class(labels_M, num_classes)
    return _sums(torch.exp(-sharpness * (1.0 - cosine_MB.index_select(0, order))), starts)


def _by_class(labels_M: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their classes, and (C + 1,) where each class begins."""
    order = torch.argsort(labels_M, stable=True)
    return order, torch.searchsorted(labels_M[order], torch.arange(num_classes + 1, device=labels_M.device))


def _sums(affinity_MB: Tensor, starts: Tensor) -> Tensor:
    # Not index_add: on GPUs that adds in any order, and the same query would not give the same bits twice.
    return torch.segment_reduce(affinity_MB, "sum", offsets=starts, axis=0, initial=0.0).T


def grid(greatest: float, steps: int, least: float = 0.1) -> list[float]:
    """`steps` values from `least`, evenly, of which the last is one step short of `greatest`.

    Source: Tip-Adapter, released code.
    """
    return [least + i * (greatest - least) / steps for i in range(steps)]


def search(
    text_BC: Tensor,
    cosine_MB: Tensor,
    labels_M: Tensor,
    targets_B: Tensor,
    sharpnesses: list[float],
    weights: list[float],
) -> tuple[float, float, int] | None:
    """Sharpness and weight of the votes with which `text + weight * votes` is right most often.

    Args:
        text_BC: logits without the cache.
        cosine_MB, labels_M: as in `votes`.
        targets_B: class of each query, int64.
        sharpnesses: tried in this order, each with all `weights` in theirs; the first of equally good pairs is kept.

    Returns:
        sharpness, weight, and the number of right queries; None if no pair is ever right.

    Source: as `grid`.
    """
    right = torch.zeros(len(sharpnesses), len(weights), dtype=torch.int64, device=text_BC.device)
    order, starts = _by_class(labels_M, text_BC.shape[1])
    rows = max(1, CHUNK // max(1, len(labels_M)))
    for start in range(0, len(targets_B), rows):
        part = slice(start, start + rows)
        distance = 1.0 - cosine_MB[order, part]
        affinity = torch.empty_like(distance)  # one for all: new memory costs ten times the arithmetic
        for i, sharpness in enumerate(sharpnesses):
            cached = _sums(torch.mul(distance, -sharpness, out=affinity).exp_(), starts)
            for j, weight in enumerate(weights):
                right[i, j] += ((text_BC[part] + weight * cached).argmax(1) == targets_B[part]).sum()
    best = int(right.max())
    if not best:
        return None
    at = (right.flatten() == best).nonzero()[0].item()  # the first; arg-max promises none
    return sharpnesses[at // len(weights)], weights[at % len(weights)], best
