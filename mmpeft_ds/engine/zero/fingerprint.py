"""Fingerprint of frozen weights, equal for any number of ranks and ZeRO stage, and computed without gathering them.

Per tensor: sum over i of (2 i + 1) * bits_i mod 2^64, where i is the element's position in the flattened tensor and
bits_i its raw bits as a signed integer. Sums of parts add up to the sum of the whole, so every rank sums the part that
it holds, and 8 bytes per tensor are all-reduced. The factors are odd: one flipped bit changes a term by an odd number
times a power of two below 2^64, so it always shows; and exchanged values do not cancel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from mmpeft_ds.backbones.common.model_hooks import HasFrozenConstants
from mmpeft_ds.backbones.common.quantised import stored
from mmpeft_ds.distributed.collectives import world_size
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.brought import brought
from mmpeft_ds.sites.feature_site import calibrated_buffers

_CHUNK = 1 << 17  # elements that become int64 at a time: 1 MB, which stays in the cache of a core
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weighted_bits(flat: Tensor, offset: int = 0) -> int:
    """Index-weighted sum of the raw bits of `flat`, shape (n,), whose first element has position `offset`.

    Returns:
        a signed 64-bit integer (sums of these wrap around, which is the arithmetic mod 2^64).
    """
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
        offset *= 2
    bits = flat.detach().contiguous().view(_BITS[flat.element_size()])
    on_cpu = bits.device.type == "cpu"
    size = max(1, min(bits.numel(), _CHUNK if on_cpu else 64 * _CHUNK))
    odd = _odds(size, bits.device)
    wide = torch.empty_like(odd)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), size):
        n = min(size, bits.numel() - start)
        part = wide[:n].copy_(bits[start : start + n])
        # sum (2 (offset + start + i) + 1) b = 2 (offset + start) sum b + sum (2 i + 1) b: one table of odd numbers
        if offset + start:
            total += 2 * (offset + start) * part.sum()
        total += torch.dot(part, odd[:n]) if on_cpu else part.mul_(odd[:n]).sum()  # CUDA has no `dot` of integers
    return int(total)


def hashed_bits(tensor: Tensor) -> int:
    """xxh3 of the bytes of a whole tensor on the CPU, as a signed integer: a tenth of the time of `weighted_bits`, for
    numbers that are not stored and need no sums over parts."""
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return int.from_bytes(xxhash.xxh3_64_digest(data), "big", signed=True)


def _odds(count: int, device: torch.device) -> Tensor:
    """The first `count` odd numbers."""
    return torch.arange(1, 2 * count + 1, 2, dtype=torch.int64, device=device)


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, saved buffers and constants of a bare base model, trainable or not."""
    for name, parameter in model.named_parameters():
        yield from _parts(name, parameter)
    yield from _buffers_and_constants(model)


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen parameters and saved buffers of `model`, under their names in the bare base model.

    Weights that an adapter has replaced by a trained copy (peft's `modules_to_save`) are left out: they have no
    effect, and a head's random values differ from run to run. Buffers that are not saved follow from the
    configuration. What layers of peft bring is not of the base.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and ".original_module." not in name:
            yield from _parts(name, parameter)
    yield from _buffers_and_constants(model)


def _parts(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter, or the tensors that hold quantised weights: `PATH.weight.qdata` and so on."""
    for part, tensor in stored(parameter).items():
        yield base_name(f"{name}.{part}" if part else name), tensor


def _buffers_and_constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Saved buffers, and the numbers of modules that are `HasFrozenConstants`."""
    # A head has set these, and layers of peft have brought those: they are not of the base.
    not_of_base = calibrated_buffers(model).keys() | brought(model).keys()
    for path, module in model.named_modules():
        if ".original_module" in path or ".modules_to_save" in path:
            continue
        if isinstance(module, HasFrozenConstants):
            yield from ((base_name(f"{path}.{key}"), value) for key, value in module.frozen_constants().items())
        for key, buffer in module.named_buffers(recurse=False):
            name = f"{path}.{key}" if path else key
            if key not in module._non_persistent_buffers_set and name not in not_of_base:
                yield base_name(name), buffer


def base_name(name: str) -> str:
    """`name` without the parts that DeepSpeed's engine and peft's wrappers have added."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    # peft trains single tokens by a layer inside the embedding
    return name.replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def frozen_fingerprint(frozen: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Fingerprint of each of the named tensors, for example of `frozen_tensors(model)`. Collective.

    A parameter partitioned by ZeRO-3 contributes its own shard without padding; any other tensor is whole on every
    rank, is read on every rank, and must be the same there.

    Returns:
        name -> `dtype shape hex`, the same on all ranks.

    Raises:
        BadInput: if the copies of a tensor differ between ranks.
    """
    prints, differing = over_ranks(frozen)
    if differing:
        raise BadInput(
            f"frozen weight {differing[0]} is not the same on all ranks; give every node the same files of the base "
            "model"
        )
    return prints


def of_frozen(model: nn.Module) -> dict[str, str]:
    """`frozen_fingerprint` of the `frozen_tensors` of a model, and of what layers of peft bring. Collective. Raises
    BadInput."""
    return frozen_fingerprint([*frozen_tensors(model), *brought(model).items()])


def of_whole(tensor: Tensor, hashed: bool = False) -> str:
    """The fingerprint of one tensor that this process holds whole.

    Args:
        hashed: by `hashed_bits`.
    """
    return _described(_kind(tensor), hashed_bits(tensor) if hashed else weighted_bits(tensor.detach().reshape(-1)))


@dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor.

    Attributes:
        kind: dtype and shape of the whole tensor.
        data: this rank's elements, without padding; of any shape.
        start: position of the first one in the whole tensor; None where every rank has the whole.
        hashed: its fingerprint is by `hashed_bits`.
        group: of the ranks among which it is split.
    """

    name: str
    kind: str
    data: Tensor
    start: int | None = None
    hashed: bool = False
    group: Any = None

    def bits(self) -> int:
        """This rank's share of the fingerprint."""
        return hashed_bits(self.data) if self.hashed else weighted_bits(self.data.reshape(-1), self.start or 0)


def parts_of(tensors: Iterable[tuple[str, Tensor]], hashed: Collection[str] = ()) -> list[Part]:
    """The parts of this rank, in the order of their names, which no copy is made of.

    Args:
        hashed: names of tensors that are whole on the CPU of every rank, whose fingerprint is by `hashed_bits`.
    """
    parts = []
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        shard = getattr(tensor, "ds_tensor", None)
        if shard is None:
            parts.append(Part(name, _kind(tensor), tensor.detach(), hashed=name in hashed))
            continue
        group = tensor.ds_process_group
        start = dist.get_rank(group=group) * shard.ds_numel
        own = max(0, min(shard.ds_numel, tensor.ds_numel - start))  # the rest is padding of undefined value
        parts.append(Part(name, _kind(tensor), shard.detach().reshape(-1)[:own], start, group=group))
    return parts


def over_ranks(
    tensors: Iterable[tuple[str, Tensor]], hashed: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Fingerprints as `frozen_fingerprint` gives them, and the names of tensors whose copies differ. Collective.

    Args:
        hashed: names of whole tensors whose fingerprint is by `hashed_bits`, the same on all ranks.
    """
    return of_parts(parts_of(tensors, hashed))


def of_parts(parts: Sequence[Part], group: Any = None) -> tuple[dict[str, str], list[str]]:
    """`over_ranks` of what the ranks hold.

    Args:
        group: of all ranks, on CPUs; None: that of the run.
    """
    sums, differing = [part.bits() for part in parts], []
    if world_size() > 1 and sums:
        nccl = group is None and "nccl" in dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        total = torch.tensor(sums, dtype=torch.int64, device=device)
        whole = torch.tensor([part.start is None for part in parts], device=device)
        ends = torch.cat((total, ~total))  # the least of ~x is ~ of the largest x: one collective for both
        dist.all_reduce(ends, op=dist.ReduceOp.MIN, group=group)
        low, high = ends[: len(total)], ~ends[len(total) :]
        if not all(part.start is None for part in parts):
            dist.all_reduce(total, group=group or next(part.group for part in parts if part.start is not None))
        differing = [parts[i].name for i in torch.nonzero(whole & (low != high)).flatten().tolist()]
        sums = torch.where(whole, low, total).tolist()
    return {part.name: _described(part.kind, value) for part, value in zip(parts, sums, strict=True)}, differing


def _described(kind: str, value: int) -> str:
    return f"{kind} {value % 2**64:016x}"


def _kind(tensor: Tensor) -> str:
    shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, shape)) or 'scalar'}"


def compare(
    saved: dict[str, str],
    now: dict[str, str],
    where: str,
    missing_ok: bool = False,
    otherwise: str = ", or start over with --fresh",
) -> None:
    """Refuse a base that is not the saved one.

    Args:
        saved: fingerprint that was written.
        now: fingerprint of the model at hand.
        where: owner of the saved fingerprint, for the message.
        missing_ok: the model may have tensors that are not in `saved` (an adapter replaces them).
        otherwise: for the message, what else may be done than restoring the base.

    Raises:
        BadInput: naming the first tensor that differs and how many do.
    """
    wrong = [name for name, value in saved.items() if now.get(name) != value]
    if not missing_ok:
        wrong += [name for name in now if name not in saved]
    if not wrong:
        return
    first, rest = wrong[0], len(wrong) - 1
    more = f" (and {rest} more)" if rest else ""
    raise BadInput(
        f"{where}: frozen weight {first}{more} is {now.get(first, 'absent')}, expected {saved.get(first, 'absent')}. "
        f"The base model has changed; restore the base this was trained on{otherwise}."
    )
