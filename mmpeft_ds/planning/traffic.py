"""Bytes that a rank receives in an optimizer step, by kind of collective, and how many of them cross nodes.

Collectives are counted as rings, as `distributed.counters` does: N - 1 shares of a gather or a reduce-scatter,
2 (N - 1) / N of the tensor for an all-reduce. The same number is sent. Where a ring of G ranks runs over nodes of g,
one link in g leads to another node, and through it passes what one rank receives: a node's traffic is that of a rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mmpeft_ds.data.order import ceil
from mmpeft_ds.engine.zero.full_state import BUCKET
from mmpeft_ds.engine.zero.resident import GRADIENT, MASTER, Layout, Tensors, persistent
from mmpeft_ds.planning.gathers import Gathers

SCALE_GROUP, SCALE = 2048, 4  # elements that share a scale under quantised weights (ds quantizer), and its bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in a step.

    Attributes:
        near: by kind, in groups within a node: copies of hpZ.
        wide: by kind, over all ranks.
        host: over PCIe, from and to host memory.
        near_calls, calls: collectives in groups, and over all ranks.
    """

    near: dict[str, int]
    wide: dict[str, int]
    host: int
    near_calls: int
    calls: int

    @property
    def total(self) -> int:
        """Over the network and inside nodes."""
        return sum(self.near.values()) + sum(self.wide.values())


def below_3(tensors: Sequence[Tensors], layout: Layout, accumulation: int, vector: int) -> Traffic:
    """Stages 0 to 2: gradients are summed with an all-reduce, once per step, at stage 2 in every micro-step; weights
    are gathered after the optimiser, which owns a share of them. `vector`: bytes that the trainer itself sums."""
    n, trained = layout.ranks, sum(t.numel for t in tensors if t.trained)
    sums = accumulation if layout.stage == 2 else 1
    reduced = sums * all_reduced(GRADIENT * trained, n) + all_reduced(vector, n)
    gathered = (n - 1) * MASTER * ceil(trained, n) if layout.stage else 0
    wide = {"all_reduce": reduced} | ({"all_gather": gathered} if gathered else {})
    return Traffic({}, wide, 0, 0, sums + 2 + bool(gathered))


def at_3(tensors: Sequence[Tensors], layout: Layout, found: Gathers, accumulation: int, vector: int) -> Traffic:
    """Stage 3: parameters are gathered where they are used, gradients reduce-scattered in every micro-step.

    With hpZ frozen parameters have a copy in the group from the first step on, trained ones once they were released.
    """
    n, group = layout.ranks, layout.group
    near = wide = host = 0
    for i, tensor in enumerate(tensors):
        first, again = found.first[i] * accumulation, found.again[i] * accumulation
        share = ceil(tensor.numel, n)
        width = _travelling(tensor) if layout.quantised else tensor.width
        in_group = again + (0 if tensor.trained else first) if group > 1 else 0
        # A copy is split after the tensor was padded for all ranks.
        near += round(in_group * (group - 1) * (share * n // group) * width)
        wide += round((first + again - in_group) * (n - 1) * share * width)
        host += (first + again) * share * tensor.width if layout.offload else 0
    kept = persistent(tensors, layout.rules)
    trained = [i for i, t in enumerate(tensors) if t.trained]
    together = [i for i in trained if i in kept]  # by `engine.zero.stage3.gather_flat`
    wide += sum((n - 1) * ceil(tensors[i].numel, n) * tensors[i].width for i in together)
    scattered = accumulation * sum((n - 1) * ceil(tensors[i].numel, n) * GRADIENT for i in trained)
    over_all = {"all_gather": wide, "reduce_scatter": scattered, "all_reduce": all_reduced(vector, n)}
    gathers, inside = (found.trained_calls, found.calls) if group > 1 else (found.calls, 0)
    after_step = ceil(sum(tensors[i].numel * tensors[i].width for i in together), BUCKET)
    calls = accumulation * (gathers + 1) + after_step + 2
    return Traffic({"all_gather": near} if near else {}, over_all, host, accumulation * inside, calls)


def all_reduced(size: int, ranks: int) -> int:
    """Bytes that a rank receives in an all-reduce."""
    return round(2 * (ranks - 1) / ranks * size)


def _travelling(tensor: Tensors) -> float:
    """Bytes of an element under quantised weights: one, and its part of a scale."""
    return tensor.width if tensor.trained else 1 + SCALE / SCALE_GROUP


def joined(found: Traffic, sent: dict[str, int], calls: int, times: int) -> Traffic:
    """With what the method itself sends over all ranks in each of so many micro-steps."""
    wide = dict(found.wide)
    for kind, size in sent.items():
        wide[kind] = wide.get(kind, 0) + times * size
    return dataclasses.replace(found, wide=wide, calls=found.calls + times * calls)
