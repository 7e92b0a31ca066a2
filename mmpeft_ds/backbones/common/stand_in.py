"""A tensor without content, with which a module is called that reads something else in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stand_in(content: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor for `content`, on its device and without memory of its own. It is not a number, so that nothing that
    computes with it goes unnoticed."""
    nothing = torch.full([1] * len(shape), torch.nan, dtype=dtype, device=content.device).expand(shape)
    nothing.stands_for = content
    return nothing


def content_of(given: Any) -> Any:
    """What is read where `given` is passed: the content of a stand-in, else the same object."""
    return getattr(given, "stands_for", given)
