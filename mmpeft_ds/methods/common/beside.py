"""The frozen Linear beside an adapter's arithmetic, where one function may compute both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpeft_ds.ops.beside_linear import Linear, Onto


class Added(NamedTuple):
    """What an adapter adds to the output of a layer.

    Attributes:
        joins: whether `onto` may compute it, if the output is of the dtype of the input.
        onto: the sum, of the output or of the map that makes it.
        alone: what is added, in the shape of the output and any dtype.
    """

    joins: bool
    onto: Callable[[Onto], Tensor]
    alone: Callable[[], Tensor]


def with_added(base: nn.Module, x: Tensor, added: Sequence[Added], *args: Any, **kwargs: Any) -> Tensor:
    """Output of `base` for `x`, and the further arguments, with everything added; in its dtype.

    The first addition is one function with the map, where it joins and the map is plain.
    """
    onto = plain_linear(base, x) if added and added[0].joins and not args and not kwargs else None
    if onto is None:
        out = base(x, *args, **kwargs)
    else:
        out, added = added[0].onto(onto), added[1:]
    for one in added:
        out = one.onto(out) if one.joins and out.dtype == x.dtype else (out + one.alone()).to(out.dtype)
    return out


def plain_linear(base: nn.Module, x: Tensor) -> Linear | None:
    """Weight and bias of `base` if calling it with `x`, outside of autocast, does nothing but multiply; else None.

    So it does where it is torch's own class with plain weights in the dtype of `x`, frozen, and nobody, such as
    ZeRO-3, waits in a hook until it is called.
    """
    if type(base) is not nn.Linear or is_watched(base) or torch.compiler.is_compiling():
        return None
    weight, bias = base.weight, base.bias
    # torchao keeps torch's layer, with quantised weights of a class of their own: int8 ones know only `linear`.
    if type(weight) is not nn.Parameter:
        return None
    if weight.dtype != x.dtype or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return Linear(weight, bias)


def is_eager(adapter: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
    """Whether an adapter that multiplies (`Multiplies`) does so with `x` in one dtype, uncompiled, without autocast.

    Then one function with a gradient of its own may compute it.

    Args:
        dtype: of its parameters.
    """
    if adapter.products is not None or x.dtype != dtype or adapter._compiled_call_impl is not None:
        return False
    return not (torch.compiler.is_compiling() or is_cast(x))


def is_cast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of products with `x`."""
    # The meta device, on which a plan counts, has no autocast.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def is_watched(module: nn.Module) -> bool:
    """Whether a call of `module` does more than its forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
