"""Muon (Jordan et al. 2024) for matrices and AdamW for other parameters, as one optimiser for partitioned matrices.

Muon orthogonalises the averaged gradient of a whole matrix, but ZeRO gives each rank flat partitions. The momentum is
averaged element by element, so it is partitioned like Adam's moments, and saved in checkpoints in the same way. Before
the orthogonalisation a matrix that is split across ranks is assembled by an all-reduce in which each rank adds its
part to zeros, which is exact. Each rank then applies `torch.optim.Muon` to the matrices of which it holds a part, and
keeps its part of the result. A matrix that lies on a single rank, as most do at stages 1 and 2, is not sent.

DeepSpeed 0.19.8 has its own Muon. It is not used, because it orthogonalises before gradients are clipped, so that the
clipping norm is that of orthogonal matrices, scales by other rules than torch, and keeps its momentum where our
checkpoints do not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTUM = "momentum_buffer"
BUCKET = 1 << 25  # elements of matrices that are put together at a time, unless one matrix has more


@dataclass(frozen=True)
class Part:
    """The part of a matrix that one flat tensor holds on this rank.

    Attributes:
        shape: (rows, columns) of the whole matrix.
        offset: position of the first element in the flat tensor.
        start: position of the same element in the flattened matrix.
        numel: elements that lie here; 0 where other ranks hold all of it.
        split: no rank holds the whole matrix; the same on all ranks.
    """

    shape: tuple[int, int]
    offset: int
    start: int
    numel: int
    split: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    def of(self, flat: Tensor) -> Tensor:
        """This rank's elements in a flat tensor, (numel,), as a view."""
        return flat.view(-1)[self.offset : self.offset + self.numel]

    def inside(self, whole: Tensor) -> Tensor:
        """The same elements in a whole matrix, (numel,), as a view."""
        return whole.view(-1)[self.start : self.start + self.numel]


class Muon(torch.optim.AdamW):
    """Muon over the parameter groups with `muon: True`, AdamW over the others.

    Args:
        groups: each with `muon`, which selects Muon or AdamW, and `weight_decay`.
        lr: of groups without their own.
        betas: of AdamW, as `eps`.
        momentum: weight of the previous average in the average of gradients.
        nesterov: use Nesterov momentum.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: rule that adjusts the learning rate to the shape of a matrix, as in `torch.optim.Muon`.

    Raises:
        ValueError: a parameter of a group with `muon: True` is no matrix.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        adjust_lr_fn: str,
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self.momentum, self.nesterov = momentum, nesterov
        self.rule = {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        self.device: torch.device | None = None  # on which matrices are assembled; None: their own
        # By the id of the tensor that is updated; ids of the parameters stay, to tell Muon's from AdamW's.
        self.parts: dict[int, list[Part]] = {}
        for parameter in (p for group in self.param_groups if group["muon"] for p in group["params"]):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if len(shape) != 2:
                raise ValueError(f"Muon steps matrices, and a parameter has the shape {shape}")
            self.parts[id(parameter)] = [Part(shape, 0, 0, shape[0] * shape[1])]

    def orthogonalises(self, tensor: Tensor) -> bool:
        """Whether Muon, not AdamW, updates this parameter or flat tensor of parameters."""
        return id(tensor) in self.parts

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the current groups, of which DeepSpeed sets one at a time. Collective if matrices are split."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in (group for group in groups if group["muon"]):
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_matrices(group, flat, self._averaged(flat))
        return loss

    def _averaged(self, flat: Tensor) -> Tensor:
        """Update the momentum, and return the matrix that is to be orthogonalised, in the layout of `flat`."""
        state = self.state[flat]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        average = state[MOMENTUM].lerp_(flat.grad, 1 - self.momentum)
        return flat.grad.lerp(average, self.momentum) if self.nesterov else average

    def _step_matrices(self, group: dict[str, Any], flat: Tensor, update: Tensor) -> None:
        for parts in _buckets(self.parts[id(flat)]):
            wholes = self._put_together(parts, update)
            held = [(part, whole) for part, whole in zip(parts, wholes, strict=True) if part.numel]
            matrices = []
            for part, whole in held:
                matrix = nn.Parameter(torch.zeros_like(whole))  # zeros for the parts of other ranks
                part.inside(matrix.data).copy_(part.of(flat))
                matrix.grad = whole
                matrices.append(matrix)
            if matrices:
                # The momentum is in the gradient already.
                given = {"lr": group["lr"], "weight_decay": group["weight_decay"], **self.rule}
                torch.optim.Muon(matrices, momentum=0.0, nesterov=False, **given).step()
            for (part, _), matrix in zip(held, matrices, strict=True):
                part.of(flat).copy_(part.inside(matrix.data))

    def _put_together(self, parts: list[Part], update: Tensor) -> list[Tensor]:
        """Whole matrices of which this rank holds parts in `update`; of others that are not split, zeros."""
        device = self.device or update.device
        flat = torch.zeros(sum(part.size for part in parts), device=device)
        wholes = flat.split([part.size for part in parts])
        for part, whole in zip(parts, wholes, strict=True):
            part.inside(whole).copy_(part.of(update))
        if parts[0].split:
            dist.all_reduce(flat)
        return [whole.view(part.shape) for part, whole in zip(parts, wholes, strict=True)]


def _buckets(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Matrices that are split, and then those that are not, in lists of at most BUCKET elements, or of one matrix."""
    for split in (True, False):
        bucket: list[Part] = []
        for part in (p for p in parts if p.split == split and (split or p.numel)):
            if bucket and sum(p.size for p in bucket) + part.size > BUCKET:
                yield bucket
                bucket = []
            bucket.append(part)
        if bucket:
            yield bucket
