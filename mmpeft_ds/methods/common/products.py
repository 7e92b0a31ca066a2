"""Matrix products of adapters in bfloat16 over a bfloat16 base; their parameters, and so gradients, stay float32.

Which dtype is a property of each module and not of a context around the forward pass: where blocks are recomputed, on
CUDA in a thread of autograd's, such a context would be gone.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn


class Multiplies:
    """Mixin of a module whose parameters multiply what the frozen model computes.

    Attributes:
        products: dtype of these products where it is not that of the parameters; see `multiply_in`.
    """

    products: torch.dtype | None = None

    def multiplying(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Context of the products with `x`: torch's autocast to `products`, which casts the parameters too."""
        if self.products is None:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, self.products)


def at_edge(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`, that of an adapter's parameters; as it is where autocast multiplies in the dtype of `x`."""
    if x.dtype == dtype:
        return x
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)  # not for the meta device, on which plans are made
    if known and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == x.dtype:
        return x
    return x.to(dtype)


def multiply_in(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on the adapters of `model` multiply in `dtype`, which is that of the frozen base.

    Heads and norms that train, and what the papers decide in float32 (routes, distances, softmax), stay as they are.
    """
    for module in list(model.modules()):
        if isinstance(module, Multiplies):
            module.products = dtype
        elif isinstance(module, lora.Linear):
            _Autocast(dtype).around(module)


class _Autocast:
    """Hooks that run the forward of a layer of peft's under autocast; what it wraps is a frozen linear layer, which
    computes in that dtype anyway."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.entered: list[torch.autocast] = []

    def around(self, layer: lora.Linear) -> None:
        layer.cast_input_dtype_enabled = False  # else peft makes a float32 copy of every input
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.entered.append(torch.autocast(args[0].device.type, self.dtype))
        self.entered[-1].__enter__()

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self.entered.pop().__exit__(None, None, None)
