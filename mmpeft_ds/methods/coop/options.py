"""Options of CoOp."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class CoOpOptions(HeadOptions):
    """Context vectors, drawn from N(0, init_std^2)."""

    method: ClassVar[str] = "coop"

    context: int = field(default=16, metadata={"help": "Number of context vectors n."})
    class_specific: bool = field(default=False, metadata={"help": "A context of its own for every class (CSC)."})
    position: Literal["end", "middle"] = field(
        default="end", metadata={"help": "Of the class name: after all vectors, or half of them follow it."}
    )
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the vectors at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("context", 1)
        self._at_least("init_std", 0)


Options = CoOpOptions
