"""Options of low-rank paths that a graph writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import PROJECTIONS, SiteOptions


@dataclass
class GraphLoraOptions(SiteOptions):
    """`out = x W^T + b + scale * up down x`, where each projection's `down` (r, d) and `up` (o, r) are linear maps of
    the two nodes of a small graph."""

    r: int = field(default=8, metadata={"help": "Rank of the added path."})
    scale: float = field(default=0.1, metadata={"help": "Factor of what is added."})
    targets: list[str] = field(
        default_factory=lambda: ["q", "v"], metadata={"help": "Which projections of an attention site: q, k, v, out."}
    )
    node_width: int = field(default=8, metadata={"help": "Width of a node."})
    relations: int = field(default=4, metadata={"help": "Relations between the nodes, each with a map of its own."})
    adjacency: Literal["released", "dense"] = field(
        default="released",
        metadata={
            "help": "`released`: each node is its own only neighbour, as in the published code, where attention gets "
            "no gradient; `dense`: all nodes are neighbours."
        },
    )
    near_identity: bool = field(
        default=True,
        metadata={"help": "`up` starts at zero, so the model starts as the frozen one; the published code does not."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("r", "node_width", "relations"):
            self._at_least(key, 1)
        self._some_of("targets", PROJECTIONS)


Options = GraphLoraOptions
