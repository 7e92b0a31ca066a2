"""A count of the bytes that real collectives bring to a rank, by kind, whoever calls them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# Name in torch.distributed -> bytes that a rank receives when it runs as a ring over n ranks, from its arguments.
RECEIVED = {
    "all_reduce": lambda n, tensor, *_: 2 * (n - 1) * _size(tensor) // n,
    "all_gather_into_tensor": lambda n, out, *_: (n - 1) * _size(out) // n,
    "all_gather": lambda n, out, *_: sum(map(_size, out)) * (n - 1) // n,
    "reduce_scatter_tensor": lambda n, out, *_: (n - 1) * _size(out),
    "reduce_scatter": lambda n, out, *_: (n - 1) * _size(out),
    "reduce": lambda n, tensor, *_: (n - 1) * _size(tensor) // n,
    "broadcast": lambda n, tensor, *_: _size(tensor),
    "all_to_all_single": lambda n, out, *_: (n - 1) * _size(out) // n,
}
KINDS = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
KINDS |= {"all_to_all_single": "all_to_all"}
FIRST = {"all_gather_into_tensor": "output_tensor", "reduce_scatter_tensor": "output", "all_to_all_single": "output"}
# What torch 2.13 calls two of them; the old names lead to these.
for _old, _new in (
    ("all_gather_into_tensor", "all_gather_single"),
    ("reduce_scatter_tensor", "reduce_scatter_single"),
):
    if hasattr(dist, _new):
        RECEIVED[_new], KINDS[_new], FIRST[_new] = RECEIVED[_old], KINDS[_old], FIRST[_old]


CALLS = "calls"  # of all kinds, beside the kinds' bytes
_OPEN: list[dict[int, Counter[str]]] = []
_INSIDE: list[str] = []  # functions that run: what they call is no further collective


def install() -> None:
    """Let the functions of torch.distributed count; call it before DeepSpeed starts, which keeps some of them."""
    for name in RECEIVED:
        watched = _watched(name, getattr(dist, name))
        setattr(dist, name, watched)
        setattr(dist.distributed_c10d, name, watched)


@contextlib.contextmanager
def counted() -> Iterator[dict[int, Counter[str]]]:
    """Count inside the block: size of the group -> kind -> bytes received, and CALLS -> collectives."""
    found: dict[int, Counter[str]] = {}
    _OPEN.append(found)
    try:
        yield found
    finally:
        _OPEN.remove(found)


def _watched(name: str, plain: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if _INSIDE:
            return plain(*args, **kwargs)
        n = dist.get_world_size(kwargs.get("group"))
        first = args[0] if args else kwargs[FIRST.get(name, "tensor")]
        for found in _OPEN:
            of_group = found.setdefault(n, Counter())
            of_group[KINDS.get(name, name)] += RECEIVED[name](n, first)
            of_group[CALLS] += 1
        _INSIDE.append(name)
        try:
            return plain(*args, **kwargs)
        finally:
            _INSIDE.pop()

    return call
