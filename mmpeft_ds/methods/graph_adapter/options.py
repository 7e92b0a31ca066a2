"""Options of GraphAdapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class GraphAdapterOptions(HeadOptions):
    """Two graphs, each with a square map and a bias per class."""

    method: ClassVar[str] = "graph_adapter"

    alpha: float = field(
        default=0.7, metadata={"help": "Share of the text graph; 0.7 is in the published code, 0.6 elsewhere."}
    )
    beta: float = field(default=0.7, metadata={"help": "Share of the text as it is; no published default."})
    groups: int = field(
        default=4,
        metadata={"help": "Groups of classes, a graph each; 1 where it does not divide the classes."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("alpha")
        self._share("beta")
        self._at_least("groups", 1)


Options = GraphAdapterOptions
