"""A call of a frozen module as a hook sees it: its arguments by name, and those that more tokens would not fit."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import nn

# Arguments whose length goes with the tokens in ways that tokens from outside cannot follow.
BOUND = {
    "position_bias": "adds a bias for each pair of positions",
    "cu_seqlens": "packs all images into one sequence",
}


class Call:
    """Arguments of a forward by their names, whether they were given by position or by name.

    Args:
        module: the module that is called; its class says the names.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._names = parameters(type(module))
        self.args, self.kwargs = list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """Its value; None if it was not given."""
        if name in self.kwargs:
            return self.kwargs[name]
        at = self._names.index(name) if name in self._names else len(self.args)
        return self.args[at] if at < len(self.args) else None

    def set(self, name: str, value: Any) -> None:
        """Replace an argument, passed by position or by name as before."""
        at = self._names.index(name)
        if name not in self.kwargs and at < len(self.args):
            self.args[at] = value
        else:
            self.kwargs[name] = value

    def result(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The return value of a forward pre-hook."""
        return tuple(self.args), self.kwargs


@cache
def parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of its forward, in order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]
