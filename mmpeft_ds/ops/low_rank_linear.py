"""A frozen linear layer and its low-rank term as one function, with as few passes over the large tensors as there are
large matrix products."""

# N rows, I width of the input, O width of the output, r rank

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """`x weight^T + bias + scale (x down^T) up^T`, all of one dtype.

    Beside the product with the weight nothing but products of rank r reads or writes a tensor of N rows: the low-rank
    terms are added where BLAS writes, forward and backward, and operands lie as BLAS reads thin matrices fastest.
    Measured on a CPU core with rank 8 over 1,400 rows, 128 to 344 wide: 4.4 ms, 6.0 ms as separate operations, 3.4 ms
    without LoRA.

    Args:
        x: (..., I).
        weight, bias: (O, I) and (O,), which get no gradient.
        down, up: (r, I) and (O, r).

    Returns:
        (..., O).
    """
    return _LowRankLinear.apply(x, weight, bias, down, up, scale)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = functional.linear(rows, down)
        ctx.save_for_backward(rows, weight, down, up, inner)
        ctx.scale, ctx.shape = scale, x.shape
        out = functional.linear(rows, weight, bias).addmm_(inner, up.T, alpha=scale)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, inner = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_x, _, _, of_down, of_up, _ = ctx.needs_input_grad
        # Thin on the left and transposed at last: BLAS takes several times as long for the same product the other way.
        given_up = (inner.T @ gradient).T.mul(ctx.scale) if of_up else None
        given_x = given_down = None
        if of_x or of_down:
            inward = functional.linear(gradient, up.T.contiguous()).mul_(ctx.scale)
            given_down = inward.T @ rows if of_down else None
            given_x = (gradient @ weight).addmm_(inward, down).view(ctx.shape) if of_x else None
        return given_x, None, None, given_down, given_up, None
