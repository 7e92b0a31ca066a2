"""A linear map's output plus its mode update, `mode_product`, as one function with its gradient written out."""

# n rows, R rank, K modes, D and O widths of the factors

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.beside_linear import Onto, add_product, input_gradient, split


def plus_modes(
    onto: Onto,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    core: Tensor,
    mode: Tensor,
    *,
    role: str,
    scale: float = 1.0,
    dropout: float = 0.0,
    drop_before_core: bool = False,
) -> Tensor:
    """`out + scale * delta`, delta as `mode_delta` (with its modes side by side), `widening_delta` or
    `narrowing_delta` give it; all tensors of one dtype.

    Autograd on these functions records some twelve operations, most of them views, and an addition to the gradient
    of `x`. Here there are little more than the matrix products: four forward and eight backward, and where the map
    is part of it no addition of two gradients of `x`.

    Args:
        onto: `out`, (..., K O) for `attention` and `widen`, (..., O) for `narrow`; or the map that makes it of `x`.
        x: (..., D), for `narrow` (..., K D).
        down, up: (R, D) and (O, R).
        core: (R, R, R).
        mode: (R, K).
        role: `attention`, `widen` or `narrow`.
        dropout, drop_before_core: as in `mode_delta`; of `attention` with several modes not before the core.

    Returns:
        (..., K O) or (..., O). A second derivative is refused.

    Source: as `mode_product`.
    """
    return _PlusModes.apply(*split(onto), x, down, up, core, mode, role, scale, dropout, drop_before_core)


class _PlusModes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor, down: Tensor, up: Tensor,
        core: Tensor, mode: Tensor, role: str, scale: float, dropout: float, before: bool,
    ) -> Tensor:  # fmt: skip
        rank, modes = mode.shape
        a = modes if role == "narrow" else 1  # chunks of the input
        rows = x.reshape(-1, x.shape[-1])
        inner = rows.reshape(-1, down.shape[1]) @ down.T
        z, dropped_z = _drop(inner.view(-1, a * rank), dropout if before else 0.0)
        middle = _middle(core, mode, role)
        t, dropped_t = _drop(z @ middle, 0.0 if before else dropout)
        ctx.save_for_backward(rows, weight, down, up, core, mode, middle, z, t, dropped_z, dropped_t)
        ctx.role, ctx.scale, ctx.shape = role, scale, x.shape
        whole = add_product(out, rows, (weight, bias), t.view(-1, rank), up.T, scale)
        return whole.view(*x.shape[:-1], whole.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, core, mode, middle, z, t, dropped_z, dropped_t = ctx.saved_tensors
        of_out, _, _, of_x, of_down, of_up, of_core, of_mode, *_ = ctx.needs_input_grad
        rank = mode.shape[0]
        whole = gradient.reshape(-1, gradient.shape[-1])
        pieces = whole.reshape(-1, up.shape[0])
        given_up = (t.view(-1, rank).T @ pieces).T if of_up else None
        given_t = (pieces @ up).view(t.shape)
        if ctx.scale != 1.0:
            given_t *= ctx.scale
            given_up = None if given_up is None else given_up * ctx.scale
        if dropped_t is not None:
            given_t *= dropped_t
        given_core = given_mode = given_x = given_down = None
        if of_core or of_mode:
            slices = _slices(z.T @ given_t, ctx.role, mode)
            given_core = (slices @ mode.T).view(core.shape) if of_core else None
            given_mode = core.view(-1, rank).T @ slices if of_mode else None
        if of_x or of_down:
            given_z = given_t @ middle.T
            if dropped_z is not None:
                given_z *= dropped_z
            given_z = given_z.view(-1, rank)
            given_x = input_gradient(whole, weight, given_z, down).view(ctx.shape) if of_x else None
            given_down = given_z.T @ rows.reshape(-1, down.shape[1]) if of_down else None
        given_out = gradient if of_out else None
        return given_out, None, None, given_x, given_down, given_up, given_core, given_mode, *[None] * 4


def _drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """`x` after dropout, drawn as torch does, and the factors."""
    if not probability:
        return x, None
    factors = torch.empty_like(x).bernoulli_(1 - probability).div_(1 - probability)
    return x * factors, factors


def _middle(core: Tensor, mode: Tensor, role: str) -> Tensor:
    """What stands between the bottlenecks, (R, K R), for `narrow` (K R, R); see `mode_product` for the layouts."""
    rank, modes = mode.shape
    slices = core.view(-1, rank) @ mode  # row i R + j: entry i, j of each slice
    if role == "attention" and modes > 1:
        return slices.view(rank, rank, modes).transpose(1, 2).reshape(rank, -1)
    return slices.view(rank, -1).T if role == "narrow" else slices.view(rank, -1)


def _slices(middle: Tensor, role: str, mode: Tensor) -> Tensor:
    """The other way: (R R, K) of what has the layout of `_middle`."""
    rank, modes = mode.shape
    if role == "attention" and modes > 1:
        return middle.view(rank, modes, rank).transpose(1, 2).reshape(-1, modes)
    return (middle.T if role == "narrow" else middle).reshape(-1, modes)
