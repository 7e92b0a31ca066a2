"""One stream of batches that several runs read, each at its own position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.stream import Step, Stream


class SharedStream:
    """A stream that several runs read; runs at the same step get the same batches.

    The run that has come least far always reads next, so only the newest step is kept.
    """

    def __init__(self, stream: Stream):
        self._stream = stream
        self._steps: Iterator[Step] | None = None
        self._at: tuple[int, int] | None = None  # epoch and step of
        self._step: Step | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """See `Stream.epoch`; several iterators may be open."""
        # Stop before the end of the stream's own iterator: the run that reaches it would open the next epoch before
        # the others have finished this one, and each of them would have to open both again.
        for step in range(start_step, self._stream.steps_per_epoch(epoch)):
            yield self._read((epoch, step))

    def _read(self, wanted: tuple[int, int]) -> Step:
        if wanted == self._at:
            return self._step
        if self._at is None or wanted != (self._at[0], self._at[1] + 1):
            self._steps = self._stream.epoch(*wanted)
        self._at = None  # if reading fails, nothing is kept
        step = next(self._steps)
        self._step = dataclasses.replace(step, micro=[MovedOnce.of(batch) for batch in step.micro])
        self._at = wanted
        return self._step

    def close(self) -> None:
        """Do nothing, since other runs may still read."""

    def end(self) -> None:
        """Close the stream itself, after all runs."""
        self._stream.close()


class MovedOnce(PackedBatch):
    """A batch that is copied to the device once for all runs."""

    _moved: ClassVar[PackedBatch | None] = None  # the copy on the device; set on the instance

    @classmethod
    def of(cls, batch: PackedBatch) -> MovedOnce:
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return cls(**fields | {"counts": None})  # the task of each run counts for itself

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """See `PackedBatch.to`; all runs of a process use the same device."""
        if self._moved is None:
            moved = super().to(device, non_blocking)
            if moved is self:
                return self
            vars(self)["_moved"] = moved
        return self._moved
