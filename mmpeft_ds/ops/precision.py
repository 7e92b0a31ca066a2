"""Precision of what must not be computed in half precision: float32, unless the input is float64 already.

Similarities, losses and trained parameters are float32 over a bfloat16 base; float64 stays float64, in which reference
vectors are compared.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of parameters that train over a base of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in `full_dtype` of its own dtype; integers become float32."""
    return x.to(full_dtype(x.dtype))
