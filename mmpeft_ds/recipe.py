"""A recipe: everything a run depends on, typed. The options of a component stand beside the component."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.engine.options import EngineOptions, MonitorOptions, OptimOptions


@dataclass
class Recipe:
    """What `launchers/train.py --recipe` reads.

    Attributes:
        run_dir: where checkpoints, curves and the adapter go; continued if it holds a valid checkpoint.
        seed: of data order, augmentation, initialisation and dropout.
        backbone: `name` of a file in backbones/ and its options.
        method: `name` of a file or folder in methods/ and the fields of its config.
    """

    run_dir: str
    backbone: dict[str, Any]
    method: dict[str, Any]
    seed: int = 0
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)
