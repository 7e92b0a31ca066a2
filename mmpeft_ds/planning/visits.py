"""The order in which a step comes to the modules of a model, which decides what ZeRO-3 gathers when.

DeepSpeed 0.19.8 fetches the parameters of a module before its forward and before its backward, and releases them
after each (runtime/zero/parameter_offload.py). A module that is one leaf is fetched with all that is in it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.engine.zero import stage3
from mmpeft_ds.planning.shapes import Live

VISITS = "visits"  # who asks for the bytes that were live


@dataclass(frozen=True)
class Visit:
    """A fetch or a release of a module's parameters.

    Attributes:
        fetch: or release.
        forward: of a forward pass, which may be a recomputation within backward.
        recomputed: a forward pass within backward.
        module: number of the module.
        direct: numbers of the parameters directly in it.
        everything: numbers of all parameters below it.
        leaf: it is fetched as a whole.
        peak: the most bytes that were live since the visit before.
        live: bytes that are live now.
        gradients: elements of the gradients that had come by then.
    """

    fetch: bool
    forward: bool
    recomputed: bool
    module: int
    direct: tuple[int, ...]
    everything: tuple[int, ...]
    leaf: bool
    peak: int
    live: int = 0
    gradients: int = 0

    @property
    def parameters(self) -> tuple[int, ...]:
        """Numbers of the parameters that are fetched."""
        return self.everything if self.leaf else self.direct


@contextlib.contextmanager
def recorded(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    leaves: Sequence[str],
    live: Live,
    gradients: Callable[[], int],
) -> Iterator[list[Visit]]:
    """Record the visits of a step that runs inside.

    Args:
        parameters: of the model, each once; their positions are their numbers.
        leaves: paths below the base model, of `stage3.leaf_paths`.
        gradients: elements of those that have come so far.
    """
    numbers = {id(p): i for i, p in enumerate(parameters)}
    visits: list[Visit] = []
    handles: list[Any] = []
    for number, (module, leaf) in enumerate(_hooked(model, "", frozenset(leaves))):
        everything = tuple(sorted({numbers[id(p)] for p in module.parameters()}))
        own = tuple(sorted({numbers[id(p)] for p in module.parameters(recurse=False)}))
        note = functools.partial(_note, visits, live, gradients, number, own, everything, leaf)
        if leaf and any(p.requires_grad for p in module.parameters()):
            handles.append(module.register_forward_pre_hook(stage3.input_with_gradient, with_kwargs=True))
        handles.append(module.register_forward_pre_hook(functools.partial(_before, note)))
        handles.append(module.register_forward_hook(functools.partial(_behind, note)))
    live.recent(VISITS)
    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()


def _hooked(module: nn.Module, name: str, leaves: frozenset[str]) -> Iterator[tuple[nn.Module, bool]]:
    """Modules that DeepSpeed hooks, parents first, and whether each is a leaf; what is in a leaf is not hooked."""
    leaf = stage3.plain(name) in leaves
    yield module, leaf
    for child_name, child in () if leaf else module.named_children():
        yield from _hooked(child, f"{name}.{child_name}" if name else child_name, leaves)


def _note(
    visits: list[Visit],
    live: Live,
    gradients: Callable[[], int],
    number: int,
    own: tuple[int, ...],
    everything: tuple[int, ...],
    leaf: bool,
    fetch: bool,
    forward: bool,
) -> None:
    recomputed = forward and torch._C._current_graph_task_id() != -1
    peak = live.recent(VISITS)
    visits.append(Visit(fetch, forward, recomputed, number, own, everything, leaf, peak, live.now, gradients()))


def _before(note: Any, module: nn.Module, args: tuple) -> Any:
    note(True, True)
    left = [0]  # gradients that have not come back

    def behind_backward() -> None:
        left[0] -= 1
        if not left[0]:
            note(False, False)

    def marked(tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        left[0] += 1
        return _Mark.apply(tensor, behind_backward)

    return _mapped(marked, args)


def _behind(note: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    note(False, True)
    seen: list[bool] = []

    def before_backward() -> None:
        if not seen:
            seen.append(True)
            note(True, False)

    def marked(tensor: Tensor) -> Tensor:
        if not (tensor.requires_grad and torch.is_grad_enabled()):
            return tensor
        return _Mark.apply(tensor, before_backward)

    return _mapped(marked, output)


def _mapped(change: Any, value: Any) -> Any:
    """`value` with its tensors changed, also those in tuples, lists and dictionaries, as which models return them."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _mapped(change, value[key])
        return value
    if type(value) in (tuple, list):
        return type(value)(_mapped(change, item) for item in value)
    return value


class _Mark(torch.autograd.Function):
    """The tensor itself; calls a function when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Any) -> Tensor:
        ctx.call = call
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None
