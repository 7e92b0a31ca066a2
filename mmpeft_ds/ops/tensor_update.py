"""Weight updates as slices of one higher-order tensor in Tucker or CP form, and what such an update adds to a map."""

# D width of the input, O width of one head (or of the whole output), H heads, R ranks of the modes

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def tucker_slice(core: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The core of one update: its last modes contracted with the rows that say which update it is.

    Args:
        core: (R1, ..., Rn).
        rows: one vector for each of the last modes, in their order; of length R of that mode.

    Returns:
        The core without those modes.

    Raises:
        ValueError: if there are too many rows, or one does not fit its mode.

    Source: TensLoRA, arXiv 2509.19391 (Tucker form).
    """
    first = core.dim() - len(rows)
    if first < 2 or any(row.shape != core.shape[first + i : first + i + 1] for i, row in enumerate(rows)):
        raise ValueError(f"rows of shapes {[tuple(r.shape) for r in rows]} do not fit a core {tuple(core.shape)}")
    if not rows:
        return core
    # One sum over all of these modes: sums over 16 numbers take five times as long. Not a matrix-vector product, whose
    # bits depend on alignment in memory.
    return (core.flatten(first) * outer(rows)).sum(-1)


def tucker_slices(core: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`tucker_slice` for all rows of the last modes, the last table's row the fastest, by one product.

    Args:
        core: (R1, R2, ...), with a mode for each table.
        tables: (rows, R) of each.

    Returns:
        (R1, R2) of each choice of rows. A second derivative is refused.
    """
    return _Slices.apply(core, *tables) if tables else (core,)


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        weights = [tables[0]]  # (choices of rows, choices of columns) of the first table, of the first two, ...
        for table in tables[1:]:
            weights.append((weights[-1][:, None, :, None] * table[None, :, None, :]).flatten(2).flatten(0, 1))
        # Not by `save_for_backward`: two losses of one forward may each have a backward pass of their own, through
        # updates that have nothing else in common.
        ctx.core, ctx.tables, ctx.weights = core, tables, weights
        ctx.set_materialize_grads(False)
        return (weights[-1] @ core.flatten(2).flatten(0, 1).T).view(-1, *core.shape[:2]).unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor, ...]:
        nothing = ctx.core.new_zeros(ctx.core.shape[:2])
        slices = torch.stack([nothing if gradient is None else gradient for gradient in given]).flatten(1)
        of_core = (slices.T @ ctx.weights[-1]).view(ctx.core.shape)
        of_weights, of_tables = slices @ ctx.core.flatten(2).flatten(0, 1), []
        for table, before in zip(ctx.tables[:0:-1], ctx.weights[-2::-1], strict=True):
            of_weights = of_weights.view(len(before), len(table), before.shape[1], table.shape[1])
            of_tables.append((of_weights * before[:, None, :, None]).sum((0, 2)))
            of_weights = (of_weights * table[None, :, None, :]).sum((1, 3))
        return of_core, of_weights, *reversed(of_tables)


def outer(rows: Sequence[Tensor]) -> Tensor:
    """Products of the entries of all rows, one from each, with the last row's index the fastest: one vector."""
    product = rows[0]
    for row in rows[1:]:
        product = (product.unsqueeze(1) * row).flatten()
    return product


def tucker_delta(x: Tensor, down_DR: Tensor, up_OR: Tensor, core: Tensor, heads_HR: Tensor | None = None) -> Tensor:
    """x W for W = core x1 down x2 up (x3 heads), without W.

    Args:
        x: (..., D).
        down_DR, up_OR, heads_HR: factors of the modes input, output (of one head, where there is a mode of heads) and
            heads.
        core: (R1, R2), or (R1, R2, R3) with heads; what `tucker_slice` gives.

    Returns:
        (..., O), or (..., H O) with the outputs of one head beside each other, as attention splits them.
    """
    z = x @ down_DR
    if heads_HR is None:
        return (z @ core) @ up_OR.T
    parts = (z @ core.flatten(1)).unflatten(-1, core.shape[1:])
    return (heads_HR @ (parts.mT @ up_OR.T)).flatten(-2)


def cp_delta(
    x: Tensor, down_DR: Tensor, up_OR: Tensor, rows: Sequence[Tensor], heads_HR: Tensor | None = None
) -> Tensor:
    """x W for W = sum_r down_r (x) up_r (x) heads_r, each term weighted by its entries of `rows`, without W.

    Args:
        x: (..., D).
        down_DR, up_OR, heads_HR: factors with one column for each of R terms.
        rows: vectors of length R, which say which update it is.

    Returns:
        As `tucker_delta`.

    Source: TensLoRA, arXiv 2509.19391 (CP form).
    """
    z = x @ down_DR
    for row in rows:
        z = z * row
    if heads_HR is None:
        return z @ up_OR.T
    return z @ torch.einsum("hr,or->hor", heads_HR, up_OR).flatten(0, 1).T
