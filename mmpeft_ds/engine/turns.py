"""Work that stops before each piece of it, so that several runs in one process can take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

T, Y = TypeVar("T"), TypeVar("Y")


class Place(NamedTuple):
    """The next piece of a run's work. Of two runs over the same data, the one with the lower place is behind.

    Attributes:
        step: optimizer steps done.
        batch: number of a validation source, and of the batch in it; after all of these the next optimizer step.
    """

    step: int
    batch: tuple[float, int] = (math.inf, 0)


def exhausted(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end. Returns its return value."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def relabelled(work: Generator[Any, None, T], label: Callable[[Any], Y]) -> Generator[Y, None, T]:
    """`work`, with `label` of all that it yields."""
    while True:
        try:
            given = next(work)
        except StopIteration as end:
            return end.value
        yield label(given)
