"""Bytes of a GPU, and of its host, that come on top of what a rank holds all the time (`engine.zero.resident`)."""

from __future__ import annotations

from collections.abc import Sequence

from mmpeft_ds.engine.zero.resident import GRADIENT, Layout, Tensors, share
from mmpeft_ds.planning.count import StepCount
from mmpeft_ds.planning.gathers import Gathers


def in_a_step(count: StepCount, found: Gathers | None, ranks: int, gradients: int) -> dict[str, int]:
    """Bytes by part at the worst moment of a step: activations and, at stage 3, parameters that are gathered then.

    `gradients`: bytes of those that are counted besides, without a part that is always there.
    """
    if found is None or ranks == 1:
        return {"activations": count.peak}
    return {"activations": count.peak, "gathered weights": max(0, found.together - count.peak - gradients)}


def of_gradients(
    count: StepCount, tensors: Sequence[Tensors], layout: Layout, micro_steps: int, left: int = 0
) -> dict[str, int]:
    """Bytes by part that gradients and their buffers add to the most that activations take.

    Activations are most when the backward pass begins, gradients when it ends, so less than their sum is needed.

    Args:
        left: bytes of gathered parameters after the backward pass.
    """
    number = sum(t.numel for t in tensors if t.trained)
    own = GRADIENT * (share(number, layout.ranks) if layout.stage else number)
    most = max(_at(live, before, number, own, layout, micro_steps) for live, before in count.gradients)
    one_tensor = layout.reduces_together(number)
    if layout.stage == 0 or (layout.stage == 3 and one_tensor):  # the tensor that they are reduced as, beside them
        # At stage 3 this rank's part comes in a tensor of its own, and is added to the one that is always there.
        most = max(most, count.end + left + 2 * GRADIENT * number + (2 * own if layout.stage == 3 else 0))
    added = max(0, most - count.peak)
    return {"gradients": min(own, added), "gradient buffers": max(0, added - own)}


def _at(live: int, before: int, number: int, own: int, layout: Layout, micro_steps: int) -> int:
    """Bytes at a moment before which so many elements of gradients have come."""
    buffers = GRADIENT * layout.bucket * layout.buckets
    later = micro_steps > 1  # gradients of the micro-step before are there from the beginning
    if layout.stage == 1 and layout.reduces_together(number):  # one tensor of all of them is always there
        return live + GRADIENT * number
    if layout.stage < 2:
        return live + GRADIENT * (number if later else before)
    if layout.stage == 2:  # DeepSpeed makes its buffers when the first gradient comes
        return live + (own if later or before else 0) + (buffers if before else 0)
    return live + own + (GRADIENT * before if layout.reduces_together(number) else buffers)


def on_host(tensors: Sequence[Tensors], layout: Layout) -> int:
    """Bytes of host memory a rank needs for an offloaded base."""
    return sum(share(t.numel, layout.ranks) * t.width for t in tensors) if layout.offload else 0
