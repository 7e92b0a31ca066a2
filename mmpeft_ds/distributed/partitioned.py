"""Parameters that ZeRO-3 partitioned at construction: their whole values, and their use by a second module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """The whole values of `parameters` on every rank, also where ZeRO-3 partitioned them at construction."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # only a model that DeepSpeed partitioned gets here

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def lent(user: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Parameters that another module holds are about to be used by `user`: ZeRO-3 is told, once, to gather them for it
    as it does for their holder."""
    known = getattr(user, "_external_params", {})
    strange = [p for p in parameters if hasattr(p, "ds_id") and (id(p) not in known or p.numel() != p.ds_numel)]
    if strange:
        import deepspeed  # only partitioned parameters get here

        for parameter in strange:
            deepspeed.zero.register_external_parameter(user, parameter)
            if parameter.numel() != parameter.ds_numel:
                parameter.all_gather()
