"""Complete masters and moments of trained parameters: gathered on rank 0 by few flat gathers, at any ZeRO stage, and
sent from it to all ranks by few flat broadcasts.

DeepSpeed's own calls run one collective per tensor, and leave the result on every rank. Here the partitions of all
tensors are concatenated and gathered in buckets, so a bucket is all the additional device memory; only rank 0
copies to the host.
"""

# N ranks, S elements of a part

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmpeft_ds.distributed.collectives import rank, world_size
from mmpeft_ds.distributed.gather import gather_on_rank0
from mmpeft_ds.engine.zero import state as zero_state

BUCKET = 1 << 27  # bytes that one gather makes on every device
LARGE = 1 << 18  # bytes of a part that is worth a gather of its own
WEIGHT = "weight"  # key of the float32 master; the others are names of the optimizer's moments


def on_rank0(
    engine: object, trainables: dict[str, nn.Parameter], keys: Iterable[str], bucket: int = BUCKET, copy: bool = True
) -> dict[str, dict[str, Tensor]]:
    """Whole float32 tensors of each trained parameter, on the CPU of rank 0. Collective.

    Args:
        engine: what `deepspeed.initialize` returned; its optimizer has state if `keys` names a moment.
        trainables: name -> parameter, the same on all ranks.
        keys: WEIGHT, and moments of the optimizer.
        bucket: bytes that one gather may bring together.
        copy: False where the tensors are read before the next step: where no rank holds a part alone, on a CPU, they
            are then the masters and moments themselves.

    Returns:
        key -> name -> tensor of the parameter's shape, names in the order of `trainables`, without those that have no
        such moment; on the other ranks the keys alone.

    Raises:
        RuntimeError: on all ranks, if DeepSpeed's tables do not fit the parameters.
    """
    keys = list(keys)
    return of_held(engine, trainables, keys, zero_state.flat_tensors(engine, keys), engine.device, bucket, copy)


def of_held(
    engine: object,
    trainables: dict[str, nn.Parameter],
    keys: Iterable[str],
    held: dict[tuple[str, int], Tensor],
    device: torch.device,
    bucket: int = BUCKET,
    copy: bool = True,
    group: Any = None,
) -> dict[str, dict[str, Tensor]]:
    """`on_rank0` of what every rank holds. Collective.

    Args:
        held: `zero_state.flat_tensors`, or copies of them.
        device: from which the parts are sent.
        group: of all ranks; None: that of the run.
    """
    keys, stage = list(keys), engine.zero_optimization_stage()
    flats = list(_flats(engine, trainables, held))
    if stage == 0 or world_size() == 1:
        if rank() == 0:
            on_host = {place: t.detach().to("cpu", torch.float32, copy=copy) for place, t in held.items()}
            for flat in flats:
                flat.whole = flat.part(on_host)[None]
    else:
        _gather(flats, held, device, bucket, group)
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
    if rank() == 0:
        for flat in flats:
            whole[flat.key] |= flat.tensors()
        whole = {key: {name: kept[name] for name in trainables if name in kept} for key, kept in whole.items()}
    return whole


def holds_part(engine: object) -> bool:
    """Whether `of_held` reads what this rank holds: rank 0 alone does where every rank holds all."""
    return rank() == 0 or engine.zero_optimization_stage() > 0


def from_rank0(
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Sequence[Tensor]],
    counts: dict[str, int],
    device: torch.device,
    bucket: int = BUCKET,
) -> Iterator[dict[str, Tensor]]:
    """Tensors that rank 0 reads, on every rank: a few names at a time, by one broadcast. Collective.

    Args:
        shapes: name -> shape of each of its tensors, the same on all ranks.
        read: the float32 tensors of a name; called on rank 0 alone.
        counts: name -> number of them, the same on all ranks.
        bucket: bytes that are sent together, unless one name has more.

    Yields:
        name -> (number, *shape) on `device`, float32.
    """
    sizes = {name: counts[name] * torch.Size(shape).numel() for name, shape in shapes.items()}
    for names in _together(sizes, bucket // 4):
        flat = torch.empty(sum(sizes[name] for name in names), device=device)
        parts = dict(zip(names, flat.split([sizes[name] for name in names]), strict=True))
        if rank() == 0:
            for name, part in parts.items():
                for place, tensor in zip(part.view(counts[name], -1), read(name), strict=True):
                    place.copy_(tensor.reshape(-1))
        if world_size() > 1:
            dist.broadcast(flat, src=0)
        yield {name: part.view(counts[name], *shapes[name]) for name, part in parts.items()}


def _together(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Names in their order, in lists of at most `limit` elements, or of one name."""
    names: list[str] = []
    for name, size in sizes.items():
        if names and sum(sizes[n] for n in names) + size > limit:
            yield names
            names = []
        names.append(name)
    if names:
        yield names


@dataclass
class Flat:
    """A flat float32 tensor of N equal parts, one on each rank; of one part where every rank holds the whole.

    Attributes:
        key: WEIGHT, or a moment.
        number: of the tensor of `zero_state.flat_tensors` that holds this rank's part.
        first: where the part begins in it.
        size: S.
        members: name, first element and shape of each parameter in it; what lies between them is padding.
        whole: (N, S) on the CPU, once gathered; on rank 0 alone.
    """

    key: str
    number: int
    first: int
    size: int
    members: list[tuple[str, int, tuple[int, ...]]]
    whole: Tensor | None = None

    def part(self, held: dict[tuple[str, int], Tensor]) -> Tensor:
        """This rank's part of such tensors, (S,)."""
        return held[self.key, self.number].detach().reshape(-1)[self.first : self.first + self.size]

    def tensors(self) -> dict[str, Tensor]:
        """The parameters' tensors, views of `whole`."""
        flat = self.whole.view(-1)
        return {
            name: flat[first : first + torch.Size(shape).numel()].view(shape) for name, first, shape in self.members
        }


def _flats(engine: object, trainables: dict[str, nn.Parameter], held: dict[tuple[str, int], Tensor]) -> Iterator[Flat]:
    """In the same order on all ranks."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    keys: dict[int, list[str]] = defaultdict(list)
    for key, number in held:
        keys[number].append(key)
    if stage == 0:  # every rank holds each parameter by itself
        numbers = {id(p): i for i, p in enumerate(p for group in zero.param_groups for p in group["params"])}
        for name, p in trainables.items():
            for key in keys[numbers[id(p)]]:
                yield Flat(key, numbers[id(p)], 0, p.numel(), [(name, 0, tuple(p.shape))])
    elif stage == 3:  # splits each parameter
        for name, p in trainables.items():
            number, first, _ = zero.grad_position[zero.get_param_id(p)]
            for key in keys[number]:
                yield Flat(key, number, first, p.ds_tensor.ds_numel, [(name, 0, zero_state.full_shape(p))])
    else:
        names = {id(p): name for name, p in trainables.items()}
        # They split each parameter group, whose parameters lie end to end; moments lie as the masters do, which `Held`
        # compares with what the forward uses.
        for number, offsets in enumerate(zero.round_robin_bit16_offsets):
            parameters = zip(zero.bit16_groups[number], offsets, strict=True)
            members = [(names[id(p)], first, tuple(p.shape)) for p, first in parameters]
            for key in keys[number]:
                size = held[key, number].numel()
                _check_layout(members, world_size() * size)
                yield Flat(key, number, 0, size, members)


def _check_layout(members: list[tuple[str, int, tuple[int, ...]]], total: int) -> None:
    """Refuse parameters that overlap in a flat tensor of `total` elements; all ranks see the same."""
    ends = [first for _, first, _ in members[1:]] + [total]
    for (name, first, shape), end in zip(members, ends, strict=True):
        if first + torch.Size(shape).numel() > end:
            raise RuntimeError(f"DeepSpeed's places of trained parameters do not fit them, first {name}")


def _gather(
    flats: list[Flat], held: dict[tuple[str, int], Tensor], device: torch.device, bucket: int, group: Any
) -> None:
    """Set `whole` of each on rank 0. Collective."""
    ranks = world_size()
    if rank() == 0:
        for flat in flats:
            flat.whole = torch.empty(ranks, flat.size)
    small = []
    for flat in flats:  # the same on all ranks, also where a large part is not to be sent as it is
        if device.type == "cpu" and 4 * flat.size >= LARGE:
            gather_on_rank0(flat.part(held).to(device, torch.float32), flat.whole, group)
        else:
            small.append(flat)
    for pieces in _buckets(small, max(1, bucket // (4 * ranks))):
        own = [flat.part(held)[begin:end].to(device, torch.float32) for flat, begin, end in pieces]
        every = gather_on_rank0(torch.cat(own), group=group)
        if every is not None:
            columns = every.cpu().split([end - begin for _, begin, end in pieces], dim=1)
            for (flat, begin, end), values in zip(pieces, columns, strict=True):
                flat.whole[:, begin:end] = values


def _buckets(flats: Iterable[Flat], limit: int) -> Iterator[list[tuple[Flat, int, int]]]:
    """The parts end to end, cut after every `limit` elements: lists of (flat, begin, end)."""
    pieces: list[tuple[Flat, int, int]] = []
    room = limit
    for flat in flats:
        begin = 0
        while begin < flat.size:
            end = min(flat.size, begin + room)
            pieces.append((flat, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield pieces
                pieces, room = [], limit
    if pieces:
        yield pieces
