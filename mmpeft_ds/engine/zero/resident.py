"""Bytes that a rank holds all the time under a ZeRO configuration: weights, optimiser, gradients and their buffers.

Activations and parameters that stage 3 gathers come on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmpeft_ds.backbones.common.quantised import nbytes, numel

GRADIENT = MASTER = 4  # bytes: float32, whatever the base is, as each of the optimiser's moments


@dataclass(frozen=True)
class Tensors:
    """A parameter of the model.

    Attributes:
        numel: elements.
        width: bytes of an element, scales of quantised weights included.
        trained: it has a gradient.
    """

    numel: int
    width: float
    trained: bool

    @classmethod
    def of(cls, parameter: nn.Parameter) -> Tensors:
        """Sizes of a parameter, which may be quantised, or on the meta device."""
        number, held = numel(parameter), nbytes(parameter)
        return cls(number, held / number if held % number else held // number, parameter.requires_grad)


@dataclass(frozen=True)
class Rules:
    """Keys of `zero_optimization` that decide what stage 3 gathers, with DeepSpeed's defaults; all in elements."""

    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000


@dataclass(frozen=True)
class Layout:
    """Distribution of the state over ranks.

    Attributes:
        stage: of ZeRO.
        ranks: of the run.
        group: ranks that keep a copy of the base together (hpZ); 1: none.
        quantised: frozen weights travel as 8-bit integers (qwZ). It rounds the base, so the trainer refuses it.
        offload: the base lies in host memory.
        rules: of stage 3.
        bucket: elements of each of DeepSpeed's buffers for gradients.
        buckets: number of these buffers.
        offload_optimizer: the optimizer's state lies in host memory.
    """

    stage: int
    ranks: int
    group: int = 1
    quantised: bool = False
    offload: bool = False
    rules: Rules = field(default_factory=Rules)
    bucket: int = 0
    buckets: int = 0
    offload_optimizer: bool = False

    @classmethod
    def of(cls, zero: Mapping[str, Any], ranks: int, gpus: int, quantised: bool = False) -> Layout:
        """Layout of a `zero_optimization` as `zero.config.merge` gives it to DeepSpeed.

        Args:
            gpus: ranks of each node, which "auto" of `zero_hpz_partition_size` stands for.
        """
        stage, group = zero.get("stage", 0), zero.get("zero_hpz_partition_size", 1)
        group = gpus if group == "auto" else int(group)
        keys = {f.name: k for f in dataclasses.fields(Rules) for k in (f.name, f"stage3_{f.name}") if k in zero}
        contiguous = bool(stage) and zero.get("contiguous_gradients", True)
        return cls(
            stage=stage,
            ranks=ranks,
            group=group if 1 < group < ranks else 1,
            quantised=quantised,
            offload=(zero.get("offload_param") or {}).get("device", "none") == "cpu",
            rules=Rules(**{name: int(zero[key]) for name, key in keys.items()}),
            bucket=int(zero["reduce_bucket_size"]),
            # Below stage 3 gradients that arrive while a full buffer is sent go into a second one.
            buckets=int(contiguous) * (2 if zero.get("overlap_comm") and stage < 3 else 1),
            offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") == "cpu",
        )

    def reduces_together(self, trained: int) -> bool:
        """Whether all gradients wait until they are reduced as one tensor, and DeepSpeed keeps no buffer:
        `stage1.reduce_flat`, `stage3_gradients.reduce_flat`. `trained`: elements that train."""
        if self.stage == 1:
            return self.buckets == 1
        return self.stage == 3 and self.buckets > 0 and self.bucket >= trained and not self.offload_optimizer


def persistent(tensors: Sequence[Tensors], rules: Rules) -> set[int]:
    """Numbers of the parameters that stay whole on every rank under stage 3."""
    return {i for i, t in enumerate(tensors) if t.numel <= rules.param_persistence_threshold}


def resident(tensors: Sequence[Tensors], layout: Layout, moments: float) -> dict[str, int]:
    """Bytes by part that a rank holds all the time, activations and gathered parameters left out.

    Trained parameters are float32 at every stage. At stage 0 the optimiser works on the parameters themselves, above
    it on a float32 copy of its share.

    Args:
        moments: of the optimiser, for each trained element on average.
    """
    n, stage = layout.ranks, layout.stage
    trained = [t for t in tensors if t.trained]
    number = sum(t.numel for t in trained)
    own = share(number, n) if stage else number
    buffers = layout.bucket * layout.buckets
    if layout.reduces_together(number):
        buffers = number - (own if stage == 1 else 0)  # stage 3 always has this rank's part besides
    parts = {
        "frozen weights": sum(_held(t, layout) for t in tensors if not t.trained),
        "trained weights": sum(_held(t, layout) for t in trained),
        "master copy": MASTER * own if stage else 0,
        "optimiser": round(MASTER * moments * own),
        "gradients": GRADIENT * own,
        "gradient buffers": GRADIENT * buffers,
    }
    if stage == 3:
        kept = [tensors[i] for i in persistent(tensors, layout.rules)] if n > 1 else []
        parts["small weights kept whole"] = sum(t.numel * t.width - _within(t, layout) for t in kept)
        parts["hpZ copy"] = sum(_copy(t, layout) for t in tensors) if 1 < layout.group < n else 0
    return parts


def share(numel: int, ranks: int) -> int:
    """Elements of a tensor that each rank keeps where all of them split it; the last one's are padded."""
    return -(-numel // ranks)


def _held(tensor: Tensors, layout: Layout) -> int:
    """The part of a parameter that a rank keeps."""
    if layout.stage < 3:
        return round(tensor.numel * tensor.width)
    return 0 if layout.offload else share(tensor.numel, layout.ranks) * tensor.width


def _within(tensor: Tensors, layout: Layout) -> int:
    """What of a rank's part lies in the memory of the whole parameter that it keeps; `stage3.part_within_whole`."""
    split = tensor.numel % layout.ranks == 0 and layout.group == 1
    return 0 if tensor.trained or not split else _held(tensor, layout)


def _copy(tensor: Tensors, layout: Layout) -> int:
    """The part of a parameter in the second copy that a group of ranks keeps."""
    return share(tensor.numel, layout.ranks) * layout.ranks // layout.group * tensor.width
