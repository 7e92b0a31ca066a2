"""What a GPU would have to wait for, or could not compute, with the line of the program that asks for it.

Kinds of a report:
    wait: the host waits until the device has finished, to read a value or a size that depends on values.
    copy: host memory is copied to the device, outside `transfer`, and the host waits for it.
    queued: the same from pinned memory, and the host goes on.
    mixed: an operation gets tensors of both devices, which torch refuses on a GPU.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import ROOT

# The size of their result depends on values, or their CUDA kernel reads a value (aten/src/ATen/native/cuda).
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "_unique", "unique_dim", "unique_consecutive"),
    *("unique_dim_consecutive", "bincount", "equal", "_coalesce", "_to_sparse", "_to_sparse_csr", "_to_sparse_csc"),
    *("histc", "_histogramdd_bin_edges"),
}
VALUE_IS_READ = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}  # where it is a tensor of the device
# Besides the pointwise ones: a CPU tensor without dimensions is taken as a number.
TAKES_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_", "where", "lerp", "lerp_"}
INDEXING = {"index", "_index_put_impl_", "_unsafe_index"}

_SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
_PASSED_OVER = (
    *(str(_SITE_PACKAGES / "torch"), sysconfig.get_paths()["stdlib"] + "/", str(Path(__file__).parent)),
    str(ROOT / "mmpeft_ds" / "host_copies.py"),  # who calls it is of interest
)


@dataclass(frozen=True)
class Report:
    """One event.

    Attributes:
        kind: `wait`, `copy`, `queued` or `mixed`.
        op: name of the operation.
        file, line: innermost line that is neither torch's nor the standard library's; relative to the repository or to
            site-packages. `autograd` where backward runs a formula of torch itself.
        caller: innermost line of the package, as `file:line`; empty if there is none.
    """

    kind: str
    op: str
    file: str
    line: int
    caller: str

    def __str__(self) -> str:
        by = f" called by {self.caller}" if self.caller and not self.file.startswith("mmpeft_ds/") else ""
        return f"{self.kind}: {self.op} at {self.file}:{self.line}{by}"


@dataclass
class Watch:
    """Reports in their order."""

    reports: list[Report] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Report]:
        """Those of some kinds."""
        return [report for report in self.reports if report.kind in kinds]

    def per_file(self, *kinds: str) -> dict[str, int]:
        """How many of them each file causes."""
        return dict(sorted(Counter(report.file for report in self.of(*kinds)).items()))


_watches: list[Watch] = []
_transfer = threading.local()


@contextmanager
def watching() -> Iterator[Watch]:
    """Collect the reports of all threads."""
    _watches.append(watch := Watch())
    try:
        yield watch
    finally:
        _watches.remove(watch)


@contextmanager
def transfer() -> Iterator[None]:
    """Copies to the device are what this code is for, as `PackedBatch.to` is."""
    _transfer.open = True
    try:
        yield
    finally:
        _transfer.open = False


def note(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Report an operation on tensors of the device. Raises RuntimeError, as torch does, where devices are mixed."""
    name = op._schema.name.partition("::")[2]
    flat = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
    if any(not tensor.is_cuda for tensor in flat) and any(tensor.is_cuda for tensor in flat):
        _note_mixture(op, name, args, flat)
    if name in WAITING or _reads_a_size(name, args, kwargs):
        _add("wait", name)


def note_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    """Report a copy between the devices."""
    if target.is_cuda == source.is_cuda:
        return
    if target.is_cuda:
        if not getattr(_transfer, "open", False):
            _add("queued" if non_blocking else "copy", "copy_ to the device")
    elif not non_blocking:
        _add("wait", "copy_ to the host")


def _note_mixture(op: torch._ops.OpOverload, name: str, args: tuple[Any, ...], flat: list[Tensor]) -> None:
    numbers = torch.Tag.pointwise in op.tags or name in TAKES_NUMBERS or name.startswith("_foreach_")
    others = [tensor for tensor in flat if not tensor.is_cuda]
    if numbers and all(tensor.dim() == 0 for tensor in others):
        if name == "where":
            _add("copy", "where of a number on the host")
        return
    if name in INDEXING and args[0].is_cuda:
        values = _tensors(args[2:])
        if all(tensor.dim() == 0 or tensor.is_cuda for tensor in values):
            if any(not tensor.is_cuda for tensor in _tensors(args[1])):
                _add("copy", f"{name} by indices of the host")
            return
    if name in ("set_", "is_set_to", "_has_compatible_shallow_copy_type"):
        return
    _add("mixed", name)
    raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _reads_a_size(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "repeat_interleave":
        return args[-1] is None if len(args) > 1 else kwargs.get("output_size") is None
    if name in VALUE_IS_READ:
        return isinstance(args[-1], Tensor) and args[-1].is_cuda
    if name in INDEXING and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
        value = args[2] if name == "_index_put_impl_" else None
        return not (value is not None and not value.is_cuda and value.numel() == 1)  # a masked_fill of a number
    return False


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return []


def _add(kind: str, op: str) -> None:
    if _watches:
        report = Report(kind, op, *_place())
        for watch in _watches:
            watch.reports.append(report)


def _place() -> tuple[str, int, str]:
    frame, place, caller = sys._getframe(1), ("autograd", 0), ""
    while frame is not None:
        file = frame.f_code.co_filename
        passed_over = file.startswith((*_PASSED_OVER, "<"))
        if place[0] == "autograd" and not passed_over:
            place = (_short(file), frame.f_lineno)
        if file.startswith(f"{ROOT}/mmpeft_ds") and not passed_over:
            caller = f"{_short(file)}:{frame.f_lineno}"
            break
        frame = frame.f_back
    return *place, caller


def _short(file: str) -> str:
    for folder in (_SITE_PACKAGES, ROOT):  # the environment may lie in the repository
        if file.startswith(f"{folder}/"):
            return file[len(str(folder)) + 1 :]
    return file
