"""The condition (image features and what goes with them) on its way from the model's forward to the adapter layers.

It is a context captured per forward, not a global: two forwards may run before one backward, and a recomputed block
(activation checkpointing) sees the condition of its own forward, because `checkpoint` captures and re-enters it.
"""

# B rows of the text side, m conditioning tokens, d width

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils.checkpoint
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What adapters may route on.

    Attributes:
        tokens: (B, m, d) conditioning features, one row per text row.
        mask: (B, m) bool, True = keep; None keeps all.
    """

    tokens: Tensor
    mask: Tensor | None = None

    def expand_to(self, rows: int) -> Condition:
        """Follow beam expansion: row b of the condition serves rows b*k ... b*k+k-1.

        Raises:
            ValueError: if `rows` is no multiple of B.
        """
        have = self.tokens.shape[0]
        if rows == have:
            return self
        if rows % have:
            raise ValueError(f"condition has {have} rows but the layer sees {rows}, which is no multiple of it")
        repeat = rows // have
        mask = None if self.mask is None else self.mask.repeat_interleave(repeat, 0)
        return Condition(self.tokens.repeat_interleave(repeat, 0), mask)


_current: contextvars.ContextVar[Condition | None] = contextvars.ContextVar("mmpeft_ds_condition", default=None)


def current() -> Condition | None:
    """The condition of the forward that is running, or None."""
    return _current.get()


@contextlib.contextmanager
def conditioned(condition: Condition | None) -> Iterator[None]:
    """Run a forward under `condition`."""
    token = _current.set(condition)
    try:
        yield
    finally:
        _current.reset(token)


def checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool = False, **kwargs: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint` whose recomputation runs under the condition of the first pass.

    Raises:
        ValueError: reentrant with a condition that needs gradient: that gradient would be lost (measured).
    """
    condition = current()
    if use_reentrant and condition is not None and condition.tokens.requires_grad:
        raise ValueError("reentrant checkpointing loses the gradient of the condition; set use_reentrant to false")

    def run(*inner: Any, **inner_kwargs: Any) -> Any:
        with conditioned(condition):
            return function(*inner, **inner_kwargs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=use_reentrant, **kwargs)
