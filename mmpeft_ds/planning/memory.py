"""Bytes of a GPU in a training step, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.data.order import ceil
from mmpeft_ds.planning.count import StepCount, Tensors
from mmpeft_ds.planning.gathers import Gathers, persistent
from mmpeft_ds.planning.traffic import GRADIENT, MASTER, Layout


@dataclass(frozen=True)
class Buckets:
    """Sizes of DeepSpeed's buffers for gradients, as the trainer passes them.

    Attributes:
        elements: `reduce_bucket_size`.
        overlap: `overlap_comm`, for which stages 1 and 2 keep two.
    """

    elements: int
    overlap: bool

    @classmethod
    def of(cls, zero: Mapping[str, Any], trained: int) -> Buckets:
        """Those of `zero_optimization` after `engine.zero.config.merge`."""
        return cls(int(zero["reduce_bucket_size"]), bool(zero.get("overlap_comm", zero.get("stage", 0) == 3)))


def resident(tensors: Sequence[Tensors], layout: Layout, buckets: Buckets, moments: int) -> dict[str, int]:
    """Bytes by part that a rank holds all the time, activations and gathered parameters left out.

    Trained parameters are float32 at every stage. At stage 0 the optimiser works on the parameters themselves, above
    it on a float32 copy of its share.
    """
    n, stage = layout.ranks, layout.stage
    trained = [t for t in tensors if t.trained]
    number = sum(t.numel for t in trained)
    share = ceil(number, n) if stage else number
    parts = {
        "frozen weights": sum(_held(t, layout) for t in tensors if not t.trained),
        "trained weights": sum(_held(t, layout) for t in trained),
        "master copy": MASTER * share if stage else 0,
        "optimiser": MASTER * moments * share,
        "gradients": GRADIENT * (number if stage == 0 else share),
        "gradient buffers": _buffers(layout, buckets),
    }
    if stage == 3:
        kept = [tensors[i] for i in persistent(tensors, layout.rules)] if n > 1 else []
        parts["small weights kept whole"] = sum(t.numel * t.width for t in kept)
        parts["hpZ copy"] = sum(_copy(t, layout) for t in tensors) if 1 < layout.group < n else 0
    return parts


def in_a_step(count: StepCount, found: Gathers | None, ranks: int) -> dict[str, int]:
    """Bytes by part at the worst moment of a step: activations and, at stage 3, parameters that are gathered then."""
    if found is None or ranks == 1:
        return {"activations": count.peak}
    return {"activations": count.peak, "gathered weights": max(0, found.together - count.peak)}


def on_host(tensors: Sequence[Tensors], layout: Layout) -> int:
    """Bytes of host memory a rank needs for an offloaded base."""
    return sum(ceil(t.numel, layout.ranks) * t.width for t in tensors) if layout.offload else 0


def _held(tensor: Tensors, layout: Layout) -> int:
    """The part of a parameter that a rank keeps."""
    if layout.stage < 3:
        return tensor.numel * tensor.width
    return 0 if layout.offload else ceil(tensor.numel, layout.ranks) * tensor.width


def _copy(tensor: Tensors, layout: Layout) -> int:
    """The part of a parameter in the second copy that a group of ranks keeps."""
    return ceil(tensor.numel, layout.ranks) * layout.ranks // layout.group * tensor.width


def _buffers(layout: Layout, buckets: Buckets) -> int:
    if not layout.stage:
        return 0
    twice = 2 if buckets.overlap and layout.stage < 3 else 1
    return GRADIENT * buckets.elements * twice
