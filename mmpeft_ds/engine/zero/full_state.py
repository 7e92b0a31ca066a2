"""Complete masters and moments of trained parameters: gathered on rank 0 by few flat gathers, at any ZeRO stage, and
sent from it to all ranks by few flat broadcasts.

DeepSpeed's own calls run one collective per tensor, and leave the result on every rank. Here the partitions of all
tensors are concatenated and gathered in buckets, so a bucket is all the additional device memory; only rank 0
copies to the host.
"""

# N ranks, S elements of a part

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

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
        copy: False where the tensors are read before the next step: on one rank, on a CPU, they are then the masters
            and moments themselves.

    Returns:
        key -> name -> tensor of the parameter's shape, names in the order of `trainables`, without those that have no
        such moment; on the other ranks the keys alone.

    Raises:
        RuntimeError: on all ranks, if DeepSpeed's tables do not fit the parameters.
    """
    keys = list(keys)
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return {key: _replicated(engine, trainables, key, copy) if rank() == 0 else {} for key in keys}
    split = _split_by_stage3 if stage == 3 else _split_by_stage1
    flats = [flat for key in keys for flat in split(engine, trainables, key)]
    _gather([flat for flat in flats if copy or not _is_whole(flat)], engine.device, bucket)
    whole: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
    if rank() == 0:
        for flat in flats:
            whole[flat.key] |= flat.tensors()
        whole = {key: {name: kept[name] for name in trainables if name in kept} for key, kept in whole.items()}
    return whole


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
    """A flat float32 tensor of N equal parts, one on each rank.

    Attributes:
        key: WEIGHT, or a moment.
        size: S.
        part: gives this rank's, (S,), on any device.
        members: name, first element and shape of each parameter in it; what lies between them is padding.
        whole: (N, S) on the CPU, once gathered; on rank 0 alone.
    """

    key: str
    size: int
    part: Callable[[], Tensor]
    members: list[tuple[str, int, tuple[int, ...]]]
    whole: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parameters' tensors, views of `whole`."""
        flat = self.whole.view(-1)
        return {
            name: flat[first : first + torch.Size(shape).numel()].view(shape) for name, first, shape in self.members
        }


def _is_whole(flat: Flat) -> bool:
    """Whether this is the one rank, and has the flat tensor as the files need it, which is then `whole`."""
    if world_size() > 1:
        return False
    part = flat.part()
    if part.device.type == "cpu" and part.dtype == torch.float32 and part.is_contiguous():
        flat.whole = part[None]
    return flat.whole is not None


def _replicated(engine: object, trainables: dict[str, nn.Parameter], key: str, copy: bool) -> dict[str, Tensor]:
    """Tensors that every rank holds whole."""
    state = engine.optimizer.state
    held = {name: p if key == WEIGHT else state[p].get(key) for name, p in trainables.items()}
    held = {name: t for name, t in held.items() if t is not None}
    return {name: t.detach().to("cpu", torch.float32, copy=copy).contiguous() for name, t in held.items()}


def _split_by_stage3(engine: object, trainables: dict[str, nn.Parameter], key: str) -> Iterator[Flat]:
    """Stage 3 splits each parameter."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    having = {n: p for n, p in trainables.items() if key == WEIGHT or key in zero_state.moments(engine, p)}
    for name, parameter in having.items():

        def part(p: nn.Parameter = parameter) -> Tensor:
            return safe_get_local_fp32_param(p) if key == WEIGHT else safe_get_local_optimizer_state(p, key)

        yield Flat(key, parameter.ds_tensor.ds_numel, part, [(name, 0, zero_state.full_shape(parameter))])


def _split_by_stage1(engine: object, trainables: dict[str, nn.Parameter], key: str) -> Iterator[Flat]:
    """Stages 1 and 2 split each parameter group, whose parameters lie end to end; moments lie as the masters do, which
    `checkpoint.Held` compares with what the forward uses."""
    zero = engine.optimizer
    names = {id(p): name for name, p in trainables.items()}
    groups = zip(zero.bit16_groups, zero.round_robin_bit16_offsets, zero.single_partition_of_fp32_groups, strict=True)
    for parameters, offsets, master in groups:
        held = master if key == WEIGHT else zero.optimizer.state[master].get(key)
        if held is None:
            continue
        members = [(names[id(p)], first, tuple(p.shape)) for p, first in zip(parameters, offsets, strict=True)]
        _check_layout(members, world_size() * held.numel())
        yield Flat(key, held.numel(), lambda held=held: held.detach(), members)


def _check_layout(members: list[tuple[str, int, tuple[int, ...]]], total: int) -> None:
    """Refuse parameters that overlap in a flat tensor of `total` elements; all ranks see the same."""
    ends = [first for _, first, _ in members[1:]] + [total]
    for (name, first, shape), end in zip(members, ends, strict=True):
        if first + torch.Size(shape).numel() > end:
            raise RuntimeError(f"DeepSpeed's places of trained parameters do not fit them, first {name}")


def _gather(flats: list[Flat], device: torch.device, bucket: int) -> None:
    """Set `whole` of each on rank 0. Collective."""
    ranks = world_size()
    if rank() == 0:
        for flat in flats:
            flat.whole = torch.empty(ranks, flat.size)
    small = []
    for flat in flats:  # the same on all ranks, also where a large part is not to be sent as it is
        if device.type == "cpu" and 4 * flat.size >= LARGE:
            gather_on_rank0(flat.part().to(device, torch.float32), flat.whole)
        else:
            small.append(flat)
    for pieces in _buckets(small, max(1, bucket // (4 * ranks))):
        own = [flat.part()[begin:end].to(device, torch.float32) for flat, begin, end in pieces]
        every = gather_on_rank0(torch.cat(own))
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
