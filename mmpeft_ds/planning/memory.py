"""Bytes of a GPU, and of its host, that come on top of what a rank holds all the time (`engine.zero.resident`)."""

from __future__ import annotations

from collections.abc import Sequence

from mmpeft_ds.engine.zero.resident import Layout, Tensors, share
from mmpeft_ds.planning.count import StepCount
from mmpeft_ds.planning.gathers import Gathers


def in_a_step(count: StepCount, found: Gathers | None, ranks: int) -> dict[str, int]:
    """Bytes by part at the worst moment of a step: activations and, at stage 3, parameters that are gathered then."""
    if found is None or ranks == 1:
        return {"activations": count.peak}
    return {"activations": count.peak, "gathered weights": max(0, found.together - count.peak)}


def on_host(tensors: Sequence[Tensors], layout: Layout) -> int:
    """Bytes of host memory a rank needs for an offloaded base."""
    return sum(share(t.numel, layout.ranks) * t.width for t in tensors) if layout.offload else 0
