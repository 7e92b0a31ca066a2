"""Computation of frozen modules shared by several models: the first model computes, the others reuse the result.

Models take turns at the same batch (`turns.Place`). A frozen module with equal inputs in its k-th call of each turn
gives equal outputs, so it runs in the first turn only. Inputs are always compared: below the lowest trained layer they
are the same tensors, above it they never are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmpeft_ds.engine.assembly.forward import equal_trees
from mmpeft_ds.engine.turns import Place


@dataclass
class _Done:
    """A finished call: its arguments, its result, and the version counter of each tensor in both."""

    arguments: tuple[list[Any], Any]
    result: Any
    versions: list[int]

    @classmethod
    def of(cls, arguments: tuple[list[Any], Any], result: Any) -> _Done:
        return cls(arguments, result, _versions(arguments[0], result))

    def answers(self, arguments: tuple[list[Any], Any]) -> bool:
        """Whether a call with these arguments gives this result."""
        if self.versions != _versions(self.arguments[0], self.result):
            return False
        return equal_trees(self.arguments, arguments)


class SharedWork:
    """Results at the current place.

    Attributes:
        done, taken: number of calls that were computed, and of calls that reused a result.
        known: paths of modules that some model shares.
    """

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.done = self.taken = 0
        self._place: Place | None = None
        self._results: dict[str, list[_Done]] = {}
        self._calls: dict[str, int] = {}  # in the current turn
        self._apart: set[tuple[str, bool]] = set()  # modules at which models differ, and whether gradients were on
        self._within, self._alone = False, True

    def begin(self, place: Place | None) -> None:
        """Begin a model's turn; results of another place are dropped. None: nothing is shared until the next turn."""
        self._calls, self._alone = {}, place is None
        if not self._alone and place != self._place:
            self._place, self._results = place, {}

    def once(self, name: str, arguments: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, or that of another model's same call of `name` if the arguments are equal."""
        if self._alone or self._within:
            return compute()
        key, flat = (name, torch.is_grad_enabled()), pytree.tree_flatten(arguments)
        if key in self._apart or (torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(flat[0]))):
            return compute()
        call = self._calls[name] = self._calls.get(name, -1) + 1
        results = self._results.setdefault(name, [])
        if call < len(results):
            if results[call].answers(flat):
                self.taken += 1
                return _handed(results[call].result)
            self._apart.add(key)
            return compute()
        self._within = True
        try:
            result = compute()
        finally:
            self._within = False
        if call == len(results) and not any(t.requires_grad for t in _tensors(result)):
            self.done += 1
            results.append(_Done.of(flat, result))
            return _handed(result)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _versions(*trees: Any) -> list[int]:
    return [0 if t.is_inference() else t._version for tree in trees for t in _tensors(tree)]


def _handed(result: Any) -> Any:
    """A shallow copy for one model, since transformers' models set fields of what their towers return."""
    return result if isinstance(result, Tensor) else copy.copy(result)
