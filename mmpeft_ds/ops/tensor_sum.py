"""A linear map's output plus one slice of a tensor in Tucker form, `tensor_update`, as one function with its gradient
written out."""

# N rows, D width of the input, O width of the slice's output, R1 and R2 ranks of these modes; I, W of the whole map

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.beside_linear import Onto, add_product, input_gradient, split
from mmpeft_ds.ops.tensor_update import outer, tucker_slice


def plus_tucker(
    onto: Onto,
    x: Tensor,
    down_DR: Tensor,
    up_OR: Tensor,
    core: Tensor,
    tables: Sequence[Tensor],
    rows: Sequence[int],
    *,
    start: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """The output plus `scale * tucker_delta(x, ...)` at features `start` to `start + O - 1`; all of one dtype.

    Args:
        onto: the output, (..., W), or the map that makes it of `x`.
        x: (..., D).
        down_DR, up_OR: factors of the modes input and output, (D, R1) and (O, R2).
        core: (R1, R2, ...), with one more mode for each of `tables`, at most two.
        tables: factors of the modes that say which slice it is.
        rows: its row in each of them.

    Returns:
        (..., W). A second derivative is refused.

    Source: as `tensor_update`.
    """
    return _PlusTucker.apply(*split(onto), x, down_DR, up_OR, core, tuple(rows), start, scale, *tables)


class _PlusTucker(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor,
        core: Tensor, rows: tuple[int, ...], start: int, scale: float, *tables: Tensor,
    ) -> Tensor:  # fmt: skip
        which = [table[row] for table, row in zip(tables, rows, strict=True)]
        middle = tucker_slice(core, which)
        tokens = x.reshape(-1, x.shape[-1])
        z = tokens @ down
        t = z @ middle
        part = None if len(up) == (len(weight) if out is None else out.shape[-1]) else (start, len(up))
        whole = add_product(out, tokens, (weight, bias), t, up.T, scale, part)
        ctx.save_for_backward(tokens, weight, down, up, core, middle, z, t, *tables)
        ctx.rows, ctx.part, ctx.scale, ctx.shape = rows, part, scale, x.shape
        return whole.view(*x.shape[:-1], whole.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, down, up, core, middle, z, t, *tables = ctx.saved_tensors
        of_out, _, _, of_x, of_down, of_up, of_core, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, gradient.shape[-1])
        piece = whole if ctx.part is None else whole.narrow(1, *ctx.part)
        given_t = piece @ up
        given_up = (t.T @ piece).T if of_up else None
        if ctx.scale != 1.0:
            given_t *= ctx.scale
            given_up = None if given_up is None else given_up * ctx.scale
        given_core, given_tables = None, [None] * len(tables)
        if of_core or any(ctx.needs_input_grad[10:]):
            which = [table[row] for table, row in zip(tables, ctx.rows, strict=True)]
            given_middle = z.T @ given_t
            if of_core:
                given_core = (given_middle.view(-1, 1) * outer(which)).view(core.shape) if which else given_middle
            given_tables = _of_tables(given_middle, core, tables, which, ctx.rows)
        given_z = given_t @ middle.T
        given_x = input_gradient(whole, weight, given_z, down.T).view(ctx.shape) if of_x else None
        given_down = tokens.T @ given_z if of_down else None
        given_out = gradient if of_out else None
        return given_out, None, None, given_x, given_down, given_up, given_core, *[None] * 3, *given_tables


def _of_tables(
    given: Tensor, core: Tensor, tables: Sequence[Tensor], which: Sequence[Tensor], rows: Sequence[int]
) -> list[Tensor]:
    """Gradients of the tables, zero but for the rows that were used.

    Args:
        given: gradient of the slice of the core, (R1, R2).
    """
    if not tables:
        return []
    weights = given.view(1, -1) @ core.view(given.numel(), -1)  # gradient of the outer product of the rows
    if len(tables) == 1:
        parts = [weights[0]]
    else:
        table = weights.view(len(which[0]), len(which[1]))
        parts = [table @ which[1], which[0] @ table]
    gradients = [torch.zeros_like(table) for table in tables]
    for gradient, part, row in zip(gradients, parts, rows, strict=True):
        gradient[row] = part
    return gradients
