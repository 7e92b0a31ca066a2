"""What many layers of a model need in a forward and one computation gives for all of them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_values: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("mmpeft_ds_once", default=None)


def values() -> dict[Any, Any] | None:
    """What the forward that is running has computed so far; None outside of any."""
    return _values.get()


@contextlib.contextmanager
def keeping(computed: dict[Any, Any] | None) -> Iterator[None]:
    """Run a forward whose layers share what `once` computes: `{}` for one that begins, `values()` of the first pass
    for a block that is recomputed, None where nothing may be shared."""
    token = _values.set(computed)
    try:
        yield
    finally:
        _values.reset(token)


def once(owner: Hashable, place: Any, of_all: Callable[[], Any], alone: Callable[[], T]) -> T:
    """`of_all()[place]`, which within `keeping` is computed at the first call for `owner`, apart with and without
    gradient; outside of it `alone()`.

    Args:
        of_all: gives what all layers ask for, tensors that depend on parameters alone, by place. Its graph is there
            once for all callers.
        alone: gives the value for this layer only; called where results are not kept, so that the values of the other
            layers are not computed in vain.
    """
    computed, key = _values.get(), (owner, torch.is_grad_enabled())
    if computed is not None and key in computed:
        return computed[key][place]
    # Activation checkpointing counts what a block saves, and another block may be the first to ask when one is run
    # again, or nothing may be kept then: what is saved here is hidden from it.
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        if computed is None:
            return alone()
        computed[key] = of_all()
    return computed[key][place]


def _same(saved: Tensor) -> Tensor:
    return saved
