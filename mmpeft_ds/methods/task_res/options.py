"""Options of TaskRes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class TaskResOptions(HeadOptions):
    """One vector per class, zero at first."""

    method: ClassVar[str] = "task_res"

    alpha: float = field(default=0.5, metadata={"help": "Factor of the residual; published 1.0 for Flowers102."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("alpha", 0)


Options = TaskResOptions
