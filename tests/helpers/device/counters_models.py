"""Counts of a forward and backward pass of every method on every tiny backbone: kernels, and waits for the device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from tests.helpers import launch
from tests.helpers.device import matrix
from tests.helpers.device.counters import counted

SCRIPT = "tests.helpers.rank_scripts.device_counts"


def kernels(made: matrix.Column, model: nn.Module) -> int:
    """Kernels of the passes, counted in the second run: the first fills caches."""
    matrix.passes(made, model, made.batch)
    with counted() as counts:
        matrix.passes(made, model, made.batch)
    return counts.kernels


def on_stand_in(name: str, folder: Path, chosen: Iterable[str] = ()) -> dict[str, dict[str, int]]:
    """Row -> `kernels` and `waits` of a column, in a process of its own with the stand-in for a GPU."""
    out = folder / f"{name.replace(' ', '_')}.json"
    result = launch.run_forked(SCRIPT, str(out), name, ";".join(chosen), ranks=0)
    assert result.code == 0, result.tail()
    return json.loads(out.read_text())
