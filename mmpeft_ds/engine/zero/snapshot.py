"""Copies in host memory of what this rank holds of a training, so that a checkpoint of one step is gathered, compared
and written beside the next ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.engine.zero import fingerprint, full_state
from mmpeft_ds.engine.zero import state as zero_state


class HostCopies:
    """Copies of tensors on the CPU, in memory that is kept for the next ones."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}
        self._made: torch.cuda.Event | None = None

    def take(self, tensors: dict[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Copy tensors into the memory of the last ones of their names; of a GPU's, `wait` before they are read.

        Returns:
            name -> contiguous copy of the same shape and dtype, until the next call.
        """
        kept, self._kept = self._kept, {}  # what is not asked for again is freed
        on_gpu = False
        with torch.no_grad():
            for name, tensor in tensors.items():
                cuda, room = tensor.is_cuda, kept.get(name)
                if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
                    room = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda)
                self._kept[name] = room.copy_(tensor.detach(), non_blocking=cuda)
                on_gpu = on_gpu or cuda
        self._made = None
        if on_gpu:
            self._made = torch.cuda.Event()
            self._made.record()
        return self._kept

    def wait(self) -> None:
        """Return when the copies are made."""
        if self._made is not None:
            self._made.synchronize()


@dataclass
class Snapshot:
    """What this rank holds of what trains after a step, in `HostCopies`.

    Attributes:
        held: copies of `zero_state.flat_tensors`.
        parts: copies of this rank's parts of the parameters that the next forward uses.
        steps: Adam's counters.
        extra: name -> copy of what else a checkpoint holds; on rank 0 alone.
    """

    held: dict[tuple[str, int], Tensor]
    parts: list[fingerprint.Part]
    steps: list[Any]
    extra: dict[str, Tensor]

    @classmethod
    def take(
        cls, copies: HostCopies, engine: Any, trainables: dict[str, nn.Parameter], extra: dict[str, Tensor]
    ) -> Snapshot:
        """Copy what this rank holds. Not collective.

        Where every rank holds all of it, rank 0 alone copies masters and moments.
        """
        zero_state.create_missing_state(engine)
        live: dict[Hashable, Tensor] = {}
        if full_state.holds_part(engine) and trainables:
            flats = zero_state.flat_tensors(engine, (full_state.WEIGHT, *zero_state.moments(engine)))
            live |= {("held", place): tensor for place, tensor in flats.items()}
        parts = fingerprint.parts_of(trainables.items(), hashed={n for n, p in trainables.items() if _is_whole(p)})
        live |= {("part", part.name): part.data for part in parts}
        steps = zero_state.step_counters(engine)
        live |= {("step", i): step for i, step in enumerate(steps) if isinstance(step, Tensor)}
        live |= {("extra", name): tensor for name, tensor in extra.items()}
        made = copies.take(live)
        return cls(
            {name: copy for (kind, name), copy in made.items() if kind == "held"},
            [dataclasses.replace(part, data=made["part", part.name]) for part in parts],
            [made.get(("step", i), step) for i, step in enumerate(steps)],
            {name: copy for (kind, name), copy in made.items() if kind == "extra"},
        )


def _is_whole(parameter: nn.Parameter) -> bool:
    return not hasattr(parameter, "ds_tensor")
