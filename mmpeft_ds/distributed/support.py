"""Support samples that are spread over ranks: class means, the whole set in a fixed order, a check of agreement."""

# n samples of this rank, M of all ranks, C classes

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.distributed.shards import all_reduced
from mmpeft_ds.errors import AgreedBadInput

PIECE = 1 << 20  # elements


def class_means(features: Tensor, labels: Tensor, num_classes: int, group: Any = None) -> tuple[Tensor, Tensor]:
    """Mean of the samples of each class over all ranks, whoever holds them. Collective.

    Args:
        features: (n, D) of this rank; n may be 0.
        labels: (n,) int64.

    Returns:
        (C, D) means in the dtype of `features`, zeros for a class without samples, summed in float64 so that they do
        not depend on the ranks but for its rounding; and (C,) int64 counts.
    """
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
    sums.index_add_(0, labels, features.double())
    counts = torch.bincount(labels, minlength=num_classes)
    all_reduced(sums, group=group)
    all_reduced(counts, group=group)
    return (sums / counts.clamp(min=1)[:, None]).to(features.dtype), counts


def gather_support(features: Tensor, labels: Tensor, ids: Tensor, group: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """All samples on every rank, in an order that does not depend on who held them: by label, then by id. Collective.

    Args:
        features: (n, ...) of this rank; n may be 0 and differ between ranks.
        labels, ids: (n,) int64; samples of equal label and id stay in rank order.

    Returns:
        features (M, ...), labels (M,), ids (M,).
    """
    everything = [gather_rows(part, group=group) for part in (features, labels, ids)]
    order = everything[2].argsort(stable=True)
    order = order[everything[1][order].argsort(stable=True)]
    features, labels, ids = (part[order] for part in everything)
    return features, labels, ids


def checksum(tensors: list[Tensor]) -> int:
    """A signed 64-bit number that depends on all bits of the tensors, on their shapes and on their order."""
    total = 0
    for tensor in tensors:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        flat = tensor.detach().contiguous().reshape(-1).view(bits)
        for part in tensor.shape:
            total = _mixed(total, part)
        # Support features of ten passes may be gigabytes, so only a piece at a time is widened to int64.
        for piece in flat.split(PIECE):
            # int64 wraps around in torch. Factors that differ by position make the sum depend on the order.
            factors = torch.arange(len(piece), device=flat.device) * 0x9E3779B1 * 2 + 1
            total = _mixed(total, int((piece.to(torch.int64) * factors).sum()))
    return total - 2**63


def _mixed(total: int, part: int) -> int:
    return (total * 1_000_003 + part) % 2**64


def check_agreement(tensors: list[Tensor], what: str, group: Any = None) -> None:
    """Refuse, on all ranks, tensors that are not the same bit for bit on every rank. Collective.

    Args:
        what: their name in the message.

    Raises:
        AgreedBadInput: they differ.
    """
    if collectives.world_size(group) == 1:
        return
    device = tensors[0].device if tensors else torch.device("cpu")
    mine = torch.tensor(checksum(tensors), dtype=torch.int64, device=device)
    least = all_reduced(mine.clone(), dist.ReduceOp.MIN, group)
    most = all_reduced(mine, dist.ReduceOp.MAX, group)
    if int(least) != int(most):
        raise AgreedBadInput(
            f"{what}: ranks hold different values. Give every rank the same files, and the same order of samples."
        )
