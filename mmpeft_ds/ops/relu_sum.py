"""A parallel bottleneck with a ReLU and what it is added to, as one function with its gradient written out."""

# N rows, I width of the map's input, D width of the bottleneck's input, r of the bottleneck, O of the output

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear, Onto, split


def plus_relu(onto: Onto, x: Tensor | None, t: Tensor, down: Linear, up: Linear) -> Tensor:
    """The output plus `up(relu(down(t)))`, all of one dtype; gradients reach the output, x, t, `down` and `up`.

    Args:
        onto: the output, (..., O), or the map that makes it of `x`, (O, I) and (O,), without gradient.
        x: (..., I), read where `onto` is a map.
        t: (..., D).
        down, up: (r, D) and (O, r), with biases.

    Returns:
        (..., O). A second derivative is refused.
    """
    return _PlusRelu.apply(*split(onto), x, t, *down, *up)


class _PlusRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor | None, weight: Tensor | None, bias: Tensor | None, x: Tensor | None, t: Tensor,
        down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        tokens = t.reshape(-1, t.shape[-1])
        inner = functional.linear(tokens, down, down_bias).relu_()
        if out is None:
            whole = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias).addmm_(inner, up.T)
        else:
            whole = torch.addmm(out.reshape(-1, len(up)), inner, up.T)
        ctx.save_for_backward(weight, tokens, inner, down, up)
        ctx.shapes = None if x is None else x.shape, t.shape
        return whole.add_(up_bias).view(*t.shape[:-1], len(up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, tokens, inner, down, up = ctx.saved_tensors
        of_out, _, _, of_x, of_t, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, len(up))
        given = torch.ops.aten.threshold_backward(whole @ up, inner, 0)
        return (
            gradient if of_out else None,
            None,
            None,
            (whole @ weight).view(ctx.shapes[0]) if of_x else None,
            (given @ down).view(ctx.shapes[1]) if of_t else None,
            given.T @ tokens,
            given.sum(0),
            (inner.T @ whole).T,
            whole.sum(0),
        )
