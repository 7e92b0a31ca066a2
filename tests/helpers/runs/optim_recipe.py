"""The smallest recipe with options of the optimiser."""

from __future__ import annotations

from typing import Any

from mmpeft_ds import recipe as recipes

RAW = {"run_dir": "x", "backbone": {"name": "features"}, "method": {"name": "task_res"}}


def recipe(**optim: Any) -> recipes.Recipe:
    """One whose section `optim` holds these."""
    return recipes.from_dict({**RAW, "optim": optim})
