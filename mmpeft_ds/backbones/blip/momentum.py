"""State of contrastive training beside the weights: a momentum teacher, and a queue of the features that it made."""

# E shared width, Q length of the queue, M pairs of all ranks

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.sites.base import SharedWithTeacher
from mmpeft_ds.sites.once import keeping

EMPTY = -100  # id of a place of the queue that was not filled yet
QUEUE_SEED = 0


class Teacher:
    """Momentum teacher: the model itself under averages of its parameters.

    Only what trains differs between teacher and student, so only that is averaged and kept; for a forward of the
    teacher the averages take the place of the student's parameters. Modules that are `SharedWithTeacher` (Aurora's
    factors) stay the student's. No second model is held, and adapters of any method work without a change.

    Args:
        model: the base model, adapters inside.
        parts: names of its submodules that the teacher runs.
        momentum: how much of an average stays at each update.
    """

    def __init__(self, model: nn.Module, parts: tuple[str, ...], momentum: float):
        self._model, self._parts, self.momentum = model, parts, momentum
        self.averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one step; the average of a new parameter starts at its value."""
        for name, parameter in self._followed().items():
            if name not in self.averages:
                self.averages[name] = parameter.detach().clone()
            elif parameter.is_floating_point():
                self.averages[name].lerp_(parameter.detach(), 1 - self.momentum)

    @contextlib.contextmanager
    def teaching(self) -> Iterator[None]:
        """Context in which the model is the teacher, without gradient."""
        swapped = [(p, self.averages[n]) for n, p in self._followed().items() if n in self.averages]
        online = [parameter.data for parameter, _ in swapped]
        try:
            for parameter, average in swapped:
                parameter.data = average
            with torch.no_grad(), keeping({}):
                yield
        finally:
            for (parameter, _), data in zip(swapped, online, strict=True):
                parameter.data = data

    def _followed(self) -> dict[str, nn.Parameter]:
        followed = {}
        for part in self._parts:
            for path, module in self._model.get_submodule(part).named_modules(prefix=part):
                if isinstance(module, SharedWithTeacher):
                    continue
                for name, parameter in module.named_parameters(path, recurse=False):
                    if parameter.requires_grad or name in self.averages:
                        followed[name] = parameter
        # Measured, the cause is unknown: at stage 3 the losses depart from those of stage 2 after an evaluation.
        partitioned = next((n for n, p in followed.items() if hasattr(p, "ds_id")), None)
        if partitioned is not None:
            raise BadInput(
                f"backbone.momentum: the teacher averages {partitioned}, which ZeRO-3 holds in parts. Use stage 2 "
                "(ds_configs/zero2.json), or momentum: 0."
            )
        return followed


class Queue:
    """The last Q pairs of teacher features and their ids, the same on every rank.

    Attributes:
        image, text: (E, Q) unit columns, at least float32; random before they are filled, the same in every run.
        ids: (Q,) int64, EMPTY where no pair was pushed yet.
        pointer: where the next pair goes.
    """

    def __init__(self, width: int, length: int):
        generator = torch.Generator().manual_seed(QUEUE_SEED)
        self.image, self.text = (
            nn.functional.normalize(torch.randn(width, length, generator=generator), dim=0) for _ in range(2)
        )
        self.ids = torch.full((length,), EMPTY)
        self.pointer = 0

    def __len__(self) -> int:
        return len(self.ids)

    def like(self, features: Tensor) -> None:
        """Move to the device of `features`, and to float64 if they are."""
        dtype = full_dtype(features.dtype)
        self.image, self.text = (t.to(features.device, dtype) for t in (self.image, self.text))
        self.ids = self.ids.to(features.device)

    @torch.no_grad()
    def push(self, image_ME: Tensor, text_ME: Tensor, ids_M: Tensor) -> None:
        """Overwrite the oldest pairs with these, which are the same on all ranks."""
        pairs, length = len(ids_M), len(self)
        if not pairs or not length:
            return
        at = (self.pointer + torch.arange(pairs, device=ids_M.device)) % length
        last = slice(max(0, pairs - length), None)  # of more pairs than places only the last are kept
        self.image[:, at[last]] = image_ME[last].T.to(self.image.dtype)
        self.text[:, at[last]] = text_ME[last].T.to(self.text.dtype)
        self.ids[at[last]] = ids_M[last]
        self.pointer = (self.pointer + pairs) % length
