"""The start of DeepSpeed around a model that is mostly frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

# DeepSpeed's own mark of a parameter that ranks do not get from rank 0, which it sets on those of its OptimizedLinear.
_NOT_SENT = "ds_optim_param"


@contextlib.contextmanager
def frozen_not_sent(model: nn.Module) -> Iterator[None]:
    """Around `deepspeed.initialize`: rank 0 sends trained parameters alone.

    Otherwise it sends every parameter that is not partitioned, one by one. Frozen ones come from the same files on
    every rank, and the fingerprint that is taken afterwards tells if they do not.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        setattr(parameter, _NOT_SENT, True)
    try:
        yield
    finally:
        for parameter in frozen:
            delattr(parameter, _NOT_SENT)


@contextlib.contextmanager
def not_moved(model: nn.Module) -> Iterator[None]:
    """Around `deepspeed.initialize` of a model that is on its device already: it is not moved there again.

    DeepSpeed keeps a weak reference to every parameter, and torch then cannot move the int8 and fp8 ones of torchao,
    not even to where they are: "Couldn't swap Linear.weight" (measured).
    """
    vars(model)["to"] = lambda *args, **kwargs: model
    try:
        yield
    finally:
        del vars(model)["to"]
