"""Integers on a device that are known on the host too, so that nobody waits for the device to learn them.

The loader knows on the CPU who owns which image, which tokens are padding and where labels stand. A tensor that
`to_device` moves keeps the original at hand. Whoever needs a size that depends on such values asks `on_host`, and the
device continues with what it has to do; `.tolist()`, `.nonzero()` and the like would wait until it has finished.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NAME = "mmpeft_host_copy"
_KEPT = (torch.int64, torch.int32, torch.bool)  # of any shape; of floating point vectors alone, not pixels


def to_device(tensor: Tensor, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    """`tensor` on `device`; indices, booleans and vectors remember their values, pixels and features do not.

    With `non_blocking`, what is not in pinned memory goes there first: a copy to a GPU waits otherwise.
    """
    device = torch.device(device)
    if non_blocking and device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return _remembering(tensor.to(device, non_blocking=non_blocking), tensor)


def on_host(tensor: Tensor) -> Tensor:
    """The values on the CPU: at once where `tensor` remembers them, otherwise by a copy that waits for the device."""
    if tensor.device.type == "cpu":
        return tensor
    return getattr(tensor, _NAME)[0] if _is_known(tensor) else tensor.cpu()


def both(change: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`change(*tensors)`, which remembers its values if all of `tensors` do; `change` keeps the device."""
    changed = change(*tensors)
    if not all(map(_is_known, tensors)):
        return changed
    return _remembering(changed, change(*map(on_host, tensors)))


def surely_all(mask: Tensor) -> bool:
    """Whether a shortcut for the case that all of `mask` is true can be taken: False where asking would wait."""
    return mask.device.type == "cpu" and bool(mask.all())


def nonzero(mask: Tensor, count: int) -> Tensor:
    """(count, dimensions) as `mask.nonzero()`, for a `count` that is known on the host."""
    return mask.nonzero_static(size=count)


def _is_known(tensor: Tensor) -> bool:
    """Whether a tensor of a device remembers its values, and nobody has written to it since."""
    kept: tuple[Tensor, int] | None = getattr(tensor, _NAME, None)
    return kept is not None and kept[1] == tensor._version


def _remembering(moved: Tensor, original: Tensor) -> Tensor:
    small = moved.dtype in _KEPT or moved.dim() == 1
    if moved.device.type not in ("cpu", "meta") and original.device.type == "cpu" and small:
        setattr(moved, _NAME, (original, moved._version))
    return moved
