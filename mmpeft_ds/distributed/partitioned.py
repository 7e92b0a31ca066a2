"""Parameters that ZeRO-3 partitioned at construction: their whole values, and their use by a second module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Context in which every rank has the whole values of `parameters`, also where ZeRO-3 partitioned them."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # reached only by models that DeepSpeed has partitioned

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def lent(user: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Call before `user` uses parameters that another module owns: registers them with ZeRO-3, once, so that they are
    gathered for `user` as for their owner."""
    known = getattr(user, "_external_params", {})
    strange = [p for p in parameters if hasattr(p, "ds_id") and (id(p) not in known or p.numel() != p.ds_numel)]
    if strange:
        import deepspeed  # reached only by models that DeepSpeed has partitioned

        for parameter in strange:
            deepspeed.zero.register_external_parameter(user, parameter)
            if parameter.numel() != parameter.ds_numel:
                parameter.all_gather()
