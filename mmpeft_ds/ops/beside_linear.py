"""What functions share that add a low-rank product to a linear map, or to its output that is there already."""

# N rows, I and O widths of input and output, r rank, w width of the part of the output that gets the product

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Linear(NamedTuple):
    """A linear map without gradient: (O, I) and (O,)."""

    weight: Tensor
    bias: Tensor | None


Onto = Linear | Tensor  # the map, which the function computes too, or its output


def split(onto: Onto) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Output, weight and bias, as far as they are given: tensors that autograd has to see one by one."""
    return (None, *onto) if isinstance(onto, Linear) else (onto, None, None)


def add_product(
    out: Tensor | None, rows: Tensor, linear: tuple[Tensor | None, Tensor | None], left: Tensor, right: Tensor,
    scale: float, part: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The map's output plus `scale * left right`, where BLAS writes it.

    Args:
        out: (..., O), which stays as it is, or None.
        rows: input of the map, (N, I), read where `out` is None.
        linear: weight and bias.
        left, right: (N, r) and (r, w); or (N c, r) for c chunks of the output, each w wide, one after the other.
        part: first output feature and w; None: all features, or chunks of them.

    Returns:
        (N, O).
    """
    if out is None:
        whole = functional.linear(rows, *linear)
    elif part is None:
        return torch.addmm(out.reshape(-1, right.shape[1]), left, right, alpha=scale).view(-1, out.shape[-1])
    else:
        whole = out.reshape(-1, out.shape[-1]).clone()
    target = whole.view(-1, right.shape[1]) if part is None else whole.narrow(1, *part)
    target.addmm_(left, right, alpha=scale)
    return whole


def input_gradient(gradient: Tensor, weight: Tensor | None, inward: Tensor, down: Tensor) -> Tensor:
    """`inward down`, plus what the map itself gives to its input.

    Args:
        gradient: of the output, (N, O).
        weight: (O, I), or None where the map is not part of the function.
        inward: (N, r), or (N c, r) for c chunks of the input.
        down: (r, I), or (r, I / c).

    Returns:
        (N, I), or (N c, I / c) without `weight`.
    """
    if weight is None:
        return inward @ down
    given = gradient @ weight
    given.view(-1, down.shape[1]).addmm_(inward, down)
    return given
