"""A linear map's output plus a parallel bottleneck with a ReLU, as one function with its gradient written out."""

# N rows, I width of the map's input, D width of the bottleneck's input, r of the bottleneck, O of the output

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mmpeft_ds.ops.beside_linear import Linear


def plus_relu(linear: Linear, x: Tensor, t: Tensor, down: Linear, up: Linear) -> Tensor:
    """`x weight^T + bias + up(relu(down(t)))`, all of one dtype; gradients reach x, t, `down` and `up`.

    Args:
        linear: (O, I) and (O,), without gradient.
        x: (..., I).
        t: (..., D).
        down, up: (r, D) and (O, r), with biases.

    Returns:
        (..., O). A second derivative is refused.
    """
    return _PlusRelu.apply(*linear, x, t, *down, *up)


class _PlusRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, x: Tensor, t: Tensor, down: Tensor, down_bias: Tensor,
        up: Tensor, up_bias: Tensor,
    ) -> Tensor:  # fmt: skip
        tokens = t.reshape(-1, t.shape[-1])
        inner = functional.linear(tokens, down, down_bias).relu_()
        out = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        out.addmm_(inner, up.T).add_(up_bias)
        ctx.save_for_backward(weight, tokens, inner, down, up)
        ctx.shapes = x.shape, t.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, tokens, inner, down, up = ctx.saved_tensors
        _, _, of_x, of_t, *_ = ctx.needs_input_grad
        whole = gradient.reshape(-1, len(weight))
        given = torch.ops.aten.threshold_backward(whole @ up, inner, 0)
        return (
            None,
            None,
            (whole @ weight).view(ctx.shapes[0]) if of_x else None,
            (given @ down).view(ctx.shapes[1]) if of_t else None,
            given.T @ tokens,
            given.sum(0),
            (inner.T @ whole).T,
            whole.sum(0),
        )
