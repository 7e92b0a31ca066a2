"""Precision of what must not be computed in half precision: float32, unless the input is float64 already.

Similarities, losses and trained parameters are float32 over a bfloat16 base; float64 stays float64, in which reference
vectors are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALONE = 2**15  # numbers that one thread of torch takes as its share of an operation, at least


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of parameters that train over a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in `full_dtype` of its own dtype; integers become float32."""
    return x.to(full_dtype(x.dtype))


def widened(x_ND: Tensor) -> Tensor:
    """`at_least_float32` of stored rows, shape (N, D), without gradient and on a CPU in this thread alone.

    torch shares the conversion of more numbers than ALONE between threads. That takes longer than the work where the
    other core has something else to do, and leaves behind a thread that waits for more by running in a circle.
    """
    rows = ALONE // max(1, x_ND.shape[1])
    dtype = full_dtype(x_ND.dtype)
    if x_ND.numel() <= ALONE or rows == 0 or x_ND.dtype == dtype or x_ND.device.type != "cpu":
        return x_ND.to(dtype)
    wide = torch.empty(x_ND.shape, dtype=dtype)
    for part, stored in zip(wide.split(rows), x_ND.split(rows), strict=True):
        part.copy_(stored)
    return wide
