"""Counts of what a block of code asks of a device: kernels, values read by the host, collectives.

Counted where torch dispatches, so that operations of DeepSpeed, transformers and the backward pass are in it too. It
is a count on CPU tensors: an operation that is no view is about one kernel on a GPU, and a read of a value is a host
synchronisation there if the tensor lies on the device.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Allocations, and views that do not say so in their schema: no kernel.
NO_KERNEL = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
}
# Operations whose result has a size that the host has to read, or that give the host a number.
READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
MASKED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # a read if by booleans
COPIES = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}  # without dispatch where the tensor is on the CPU


@dataclass
class Counts:
    """What was counted.

    Attributes:
        kernels: operations that are neither views nor allocations nor collectives.
        reads: values, or sizes that depend on values, that the host read.
        collectives: calls by name, such as `allgather_`, in torch's spelling without underscores at the ends.
        sizes: bytes of the output of each collective, in order.
        names: of the kernels and reads, with their numbers.
    """

    kernels: int = 0
    reads: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    sizes: list[int] = field(default_factory=list)
    names: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """Collectives of all kinds."""
        return self.collectives.total()


@contextlib.contextmanager
def counted() -> Iterator[Counts]:
    """Count until the block ends; only what this thread does, which on a CPU is the backward pass too."""
    counts = Counts()
    with _Dispatched(counts), _Called(counts):
        yield counts


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        counts, name = self.counts, func._schema.name
        if name.startswith("c10d::"):
            counts.collectives[name.removeprefix("c10d::").strip("_")] += 1
            outputs = tree_leaves(args[0]) if args else []
            counts.sizes.append(sum(t.nbytes for t in outputs if isinstance(t, torch.Tensor)))
            return func(*args, **kwargs)
        if _reads(name, args, kwargs):
            counts.reads += 1
            counts.names[name] += 1
        elif name not in NO_KERNEL and not _is_view(func):
            counts.kernels += 1
            counts.names[name] += 1
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in COPIES:
            self.counts.reads += 1
            self.counts.names[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _reads(name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
    if name in MASKED:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if name == "aten::repeat_interleave":  # the size of the result is the sum of the counts
        return kwargs.get("output_size") is None
    return name in READS


def _is_view(func: Any) -> bool:
    aliases = [r.alias_info for r in func._schema.returns if r.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)
