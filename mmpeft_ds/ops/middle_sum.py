"""A linear map's output plus a low-rank update with a matrix in its middle, as one function with its gradient written
out."""

# n rows, D and O widths of the factors, R1 and R2 ranks; a and b chunks of the input and of the output

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_ds.ops.beside_linear import Onto, add_product, input_gradient, split


def plus_middle(
    onto: Onto,
    x: Tensor,
    down: Tensor,
    middle: Tensor,
    up: Tensor,
    *,
    part: tuple[int, int] | None = None,
    dropout: float = 0.0,
    drop_before: bool = False,
) -> Tensor:
    """The output plus `x down^T middle up^T`, each chunk of the input by `down`, each of the output by `up`; all
    tensors of one dtype.

    Autograd on separate operations records some twelve, most of them views, and an addition to the gradient of `x`.
    Here there are little more than the matrix products: four forward and seven backward, and where the map is part of
    it no addition of two gradients of `x`.

    Args:
        onto: the output, or the map that makes it of `x`.
        x: (..., a D).
        down, up: (R1, D) and (O, R2).
        middle: (a R1, b R2).
        part: first output feature that it is added to, and O, where b is 1; None: it is added to all of them.
        dropout: probability, of what `middle` gives or, with `drop_before`, of what it gets.

    Returns:
        (..., b O), with `part` as wide as the output. A second derivative is refused.
    """
    if part == (0, onto.weight.shape[0] if isinstance(onto, tuple) else onto.shape[-1]):
        part = None
    return _PlusMiddle.apply(*split(onto), x, down, middle, up, part, dropout, drop_before)


class _PlusMiddle(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor, down: Tensor,
        middle: Tensor, up: Tensor, part: tuple[int, int] | None, dropout: float, before: bool,
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        z = _cut(rows, down.shape[1]) @ down.T
        z, dropped_z = _drop(_cut(z, len(middle)), dropout if before else 0.0)
        t, dropped_t = _drop(z @ middle, 0.0 if before else dropout)
        ctx.save_for_backward(rows, weight, down, middle, up, z, t, dropped_z, dropped_t)
        ctx.part, ctx.shape = part, x.shape
        whole = add_product(out, rows, (weight, bias), _cut(t, up.shape[1]), up.T, 1.0, part)
        return whole.view(*x.shape[:-1], whole.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, middle, up, z, t, dropped_z, dropped_t = ctx.saved_tensors
        of_out, _, _, of_x, of_down, of_middle, of_up, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, gradient.shape[-1])
        pieces = _cut(whole, len(up)) if ctx.part is None else whole.narrow(1, *ctx.part)
        given_up = (_cut(t, up.shape[1]).T @ pieces).T if of_up else None
        given_t = _cut(pieces @ up, t.shape[1])
        if dropped_t is not None:
            given_t *= dropped_t
        given_middle = z.T @ given_t if of_middle else None
        given_x = given_down = None
        if of_x or of_down:
            given_z = given_t @ middle.T
            if dropped_z is not None:
                given_z *= dropped_z
            given_z = _cut(given_z, len(down))
            given_x = input_gradient(whole, weight, given_z, down).view(ctx.shape) if of_x else None
            given_down = given_z.T @ _cut(rows, down.shape[1]) if of_down else None
        given_out = gradient if of_out else None
        return given_out, None, None, given_x, given_down, given_middle, given_up, None, None, None


def _cut(rows: Tensor, width: int) -> Tensor:
    """Rows cut, or joined, to that width."""
    return rows if rows.shape[1] == width else rows.reshape(-1, width)  # a view takes half as long as a product here


def _drop(x: Tensor, probability: float) -> tuple[Tensor, Tensor | None]:
    """`x` after dropout, drawn as torch does, and the factors."""
    if not probability:
        return x, None
    factors = torch.empty_like(x).bernoulli_(1 - probability).div_(1 - probability)
    return x * factors, factors
