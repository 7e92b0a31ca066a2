"""Count of one micro-batch: bytes, operations and visits of modules, from the model's own forward and backward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.distributed.counters import Traffic, counted
from mmpeft_ds.engine.assembly.build import recompute_blocks
from mmpeft_ds.engine.assembly.forward import adapted_layer, forward
from mmpeft_ds.engine.assembly.resolve import Resolved, attach
from mmpeft_ds.engine.step import set_modes
from mmpeft_ds.engine.zero import stage3
from mmpeft_ds.engine.zero.resident import Tensors
from mmpeft_ds.errors import BadInput
from mmpeft_ds.planning.shapes import Counting, Live, counting
from mmpeft_ds.planning.visits import VISITS, Visit, recorded
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.unread import LastLayer

GRADIENTS = "gradients"  # who asks for the bytes that were live


@dataclass(frozen=True)
class StepCount:
    """Tensors and operations of one micro-batch on one rank, without weights and gradients.

    Attributes:
        peak: bytes of activations and working space together, at the worst moment.
        kept: bytes kept for the backward pass when it begins.
        head: bytes that the output layer and the loss add to what was there, at their worst.
        batch: bytes of the micro-batch on the device.
        forward_flops, flops: of the forward pass, and of the whole micro-step, by dtype such as `bfloat16`.
        moved: bytes that operations read and write.
        visits: fetches and releases of modules, in order, as ZeRO-3 sees them.
        last: the most bytes that were live after the last of them; end: those that are when all gradients have come.
        gradients: moments of the backward pass: the most bytes that were live, new gradients among them, and the
            elements of the gradients that had come before.
        sent: bytes that the method's own collectives bring, by kind; calls: their number.
    """

    peak: int
    kept: int
    head: int
    batch: int
    forward_flops: dict[str, int]
    flops: dict[str, int]
    moved: int
    visits: tuple[Visit, ...]
    last: int
    end: int
    gradients: tuple[tuple[int, int], ...]
    sent: dict[str, int] = field(default_factory=dict)
    calls: int = 0


@dataclass(frozen=True)
class Model:
    """A model on the meta device, and its parameters in their order, each once."""

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]

    @property
    def buffers(self) -> int:
        """Bytes of its buffers, which no stage of ZeRO splits."""
        return sum(buffer.nbytes for buffer in self.module.buffers())

    @property
    def tensors(self) -> tuple[Tensors, ...]:
        """The same as plain numbers."""
        return tuple(Tensors.of(p) for p in self.parameters)


def build(resolved: Resolved) -> Model:
    """The model of a recipe with its adapters, without storage.

    Adapters multiply in float32 here, whatever `engine.adapter_matmul` says: autocast does not know the meta device.
    """
    engine = dataclasses.replace(resolved.recipe.engine, adapter_matmul="float32")
    resolved = dataclasses.replace(resolved, recipe=dataclasses.replace(resolved.recipe, engine=engine))
    with torch.device("meta"):
        module = attach(resolved, resolved.backbone.build(on_meta=True))
    return Model(module, tuple(module.parameters()))


@dataclass(frozen=True)
class Others:
    """What is assumed of the other ranks where samples meet those of theirs.

    Attributes:
        ranks: of the run.
        neighbours: of each sample in a graph by threshold.
    """

    ranks: int = 1
    neighbours: float = 16.0


def joins_ranks(resolved: Resolved) -> bool:
    """Whether the method itself sends something between ranks: a graph over samples, or parts of a cache or of
    classes."""
    options = resolved.method_options
    # GA-Net's convolutions gather rows also where it has no edges.
    return hasattr(options, "exchange") or getattr(options, "shard", "none") != "none"


def count(resolved: Resolved, batch: PackedBatch, recompute: bool, others: Others | None = None) -> StepCount:
    """Run one micro-batch forward and backward without numbers.

    Args:
        batch: on the CPU.
        recompute: `engine.gradient_checkpointing`.
        others: where the method joins ranks; None: one rank.

    Raises:
        BadInput: a model that cannot recompute, or that cannot be counted.
    """
    recipe = resolved.recipe
    engine = dataclasses.replace(recipe.engine, gradient_checkpointing=recompute)
    recipe = dataclasses.replace(recipe, engine=engine)
    model = build(resolved)
    base = base_model(model.module)
    if recompute:
        recompute_blocks(base)
    set_modes(model.module, resolved.backbone, recipe)
    live = Live()
    for tensor in (*model.parameters, *model.module.buffers()):
        live.ignore(tensor)
    arriving = _Arriving(live, model.parameters)
    leaves = stage3.leaf_paths(model.module, find_sites(base), adapted_layer(resolved.backbone, base))
    began: list[tuple[int, int]] = []  # visits and live bytes before the output layer
    output = resolved.backbone.output_layer(base) if resolved.backbone.generates else None
    sent = Traffic()
    with (
        _among(others or Others(), resolved),
        counting(live) as counts,
        _begun(model.module, resolved, counts),
        counted(sent),
        recorded(model.module, model.parameters, leaves, live, lambda: arriving.before) as visits,
    ):
        if output is not None:
            output.register_forward_pre_hook(lambda *_: began.append((len(visits), live.now)))
        task, moved = resolved.train[0].task, batch.to("meta")
        size = live.now
        outputs = forward(model.module, resolved.backbone, moved, scores=True, last=LastLayer(base))
        began.append((len(visits), live.now))
        loss = task.loss(outputs, moved)
        first, before = began[0]
        head = max([live.now, *(v.peak for v in visits[first + 1 :])]) - before
        graph = getattr(outputs, "graph", None)  # which a step measures after the backward pass
        del outputs
        forward_flops, kept = dict(counts.flops), live.now
        if loss.requires_grad:  # else a head that trains nothing by gradients
            loss.backward()
        end = live.now
        del graph
    return StepCount(
        peak=live.peak,
        kept=kept,
        head=max(0, head),
        batch=size,
        forward_flops=_named(forward_flops),
        flops=_named(counts.flops),
        moved=counts.moved,
        visits=tuple(visits),
        last=live.recent(VISITS),
        end=end,
        gradients=arriving.moments(),
        sent=dict(sent.bytes),
        calls=sent.total_calls,
    )


def _among(others: Others, resolved: Resolved) -> contextlib.AbstractContextManager:
    if not joins_ranks(resolved):
        return contextlib.nullcontext()
    from mmpeft_ds.planning.others import simulated  # reads heads with graphs

    return simulated(others.ranks, others.neighbours)


@contextlib.contextmanager
def _begun(module: nn.Module, resolved: Resolved, counts: Counting) -> Iterator[None]:
    """Begin with what a head with a graph computes once in a run: it is held, and no part of a step."""
    if any(hasattr(resolved.method_options, name) for name in ("exchange", "shard")):
        from mmpeft_ds.planning.others import begin  # reads heads with graphs

        begin(module)
        counts.live.peak, counts.moved = counts.live.now, 0
        counts.live.recent(GRADIENTS)
        counts.flops.clear()
    yield


class _Arriving:
    """Gradients as they come. They are counted apart: what is kept of them depends on the ZeRO stage."""

    def __init__(self, live: Live, parameters: Sequence[nn.Parameter]):
        self.live, self.before = live, 0
        live.recent(GRADIENTS)
        self._moments: list[tuple[int, int]] = []
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._come)

    def _come(self, parameter: nn.Parameter) -> None:
        self._note()
        self.before += parameter.numel()
        parameter.grad = None

    def _note(self) -> None:
        self._moments.append((self.live.recent(GRADIENTS), self.before))

    def moments(self) -> tuple[tuple[int, int], ...]:
        """In their order, without those that need less than a later one."""
        self._note()
        kept: list[tuple[int, int]] = []
        for moment in reversed(self._moments):
            if not kept or moment[0] > kept[-1][0]:
                kept.append(moment)
        return tuple(reversed(kept))


def _named(flops: dict[torch.dtype, int]) -> dict[str, int]:
    return {str(dtype).removeprefix("torch."): number for dtype, number in flops.items() if number}


def with_both(resolved: Resolved, batch: PackedBatch, others: Others | None = None) -> dict[bool, Any]:
    """Counts without and with recomputation; a choice that the model cannot make is missing."""
    counts = {False: count(resolved, batch, False, others)}
    try:
        counts[True] = count(resolved, batch, True, others)
    except BadInput:
        if resolved.recipe.engine.gradient_checkpointing:
            raise
    return counts
