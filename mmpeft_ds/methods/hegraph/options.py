"""Options of HeGraphAdapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import HeadOptions
from mmpeft_ds.ops.class_relations import RELATIONS, Coefficients, Relation, in_use

# What decides whether a relation has a say, by name of its coefficient.
FACTORS = {
    "pn": "beta_pn",
    "vn": "beta_vn",
    "pp": "alpha_pp",
    "vp": "alpha_vp",
    "np": "alpha_np",
    "vv": "gamma",
}


@dataclass
class HeGraphOptions(HeadOptions):
    """A graph over classes (text, negated text, mean image) refines the text classifier and shifts a cache of support
    features; both heads vote. Every number of the paper is an option, since they are known from secondary sources."""

    method: ClassVar[str] = "hegraph"

    beta_pn: float = field(default=0.5, metadata={"help": "Of the message text -> negated text."})
    beta_vn: float = field(default=0.5, metadata={"help": "Of the message class mean -> negated text."})
    alpha_pp: float = field(default=0.06, metadata={"help": "Of the message text -> text."})
    alpha_vp: float = field(default=0.24, metadata={"help": "Of the message class mean -> text."})
    alpha_np: float = field(default=0.2, metadata={"help": "Of the message negated text -> text, in training."})
    alpha_np_test: float | None = field(
        default=0.1, metadata={"help": "The same in evaluation and export; null: as in training."}
    )
    gamma: float = field(default=0.5, metadata={"help": "How far cache rows move with their class."})
    visual_loss: float = field(default=0.1, metadata={"help": "lambda: weight of the cache head in the loss."})
    fusion: float = field(default=1.0, metadata={"help": "w: weight of the cache head in predictions."})
    fuse: Literal["probabilities", "logits"] = field(
        default="probabilities", metadata={"help": "Predict by the mean of two softmaxes, or by text + w * cache."}
    )
    activation: Literal["tanh", "relu", "identity"] = field(default="tanh", metadata={"help": "Of every message."})
    degree: Literal["bipartite", "target"] = field(
        default="bipartite",
        metadata={"help": "Degree of a sender: the sum of what it sends, or what the receiver of its class gets."},
    )
    flip: bool = field(
        default=True, metadata={"help": "Edges of a class to itself that change sign; false keeps the cosine."}
    )
    topk: int | None = field(
        default=None, metadata={"help": "Keep so many edges per row, of largest magnitude, and the diagonal."}
    )
    drop: list[str] = field(
        default_factory=list, metadata={"help": "Relations to leave out, of pn, vn, pp, vp, np, vv."}
    )
    learned: bool = field(
        default=False, metadata={"help": "Train the factors of the messages too, positive, from the values here."}
    )
    search: bool = field(
        default=False,
        metadata={"help": "After training, try multiples of alpha_np_test, alpha_vp, gamma and fusion on validation."},
    )
    multiples: list[float] = field(
        default_factory=lambda: [1.0, 0.0, 0.5, 2.0], metadata={"help": "The multiples that are tried."}
    )
    visual_scale: float | None = field(
        default=None, metadata={"help": "Scale of the cache head's logits; default that of the text head."}
    )
    cache_reduce: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "Add up the affinities of a class, or average them over its cache rows."}
    )
    shard: Literal["none", "cache", "classes"] = field(
        default="none", metadata={"help": "What is divided among ranks: nothing, cache rows, or classes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.drop if name not in RELATIONS]
        if unknown:
            raise BadInput(f"drop: {unknown[0]!r} is no relation. Known: {', '.join(RELATIONS)}.")
        if self.topk is not None and self.topk < 1:
            raise BadInput(f"topk: must be 1 or more, or null for all edges, got {self.topk}.")
        for key in ("visual_loss", "fusion"):
            self._at_least(key, 0)
        if not self.relations:
            raise BadInput("drop: no relation that has a say is left, so nothing would train. Drop fewer.")
        if not self.multiples or min(self.multiples) < 0:
            raise BadInput(f"multiples: must be numbers of 0 or more, at least one, got {self.multiples}.")
        if self.learned:
            low = [FACTORS[name] for name in self.relations if getattr(self, FACTORS[name]) <= 0]
            if low:
                raise BadInput(f"{low[0]}: learned factors start above 0. Use drop to leave a relation out.")

    @property
    def relations(self) -> dict[str, Relation]:
        """Those that have a say: without np nobody reads the negated texts."""
        return in_use(self.drop)

    @property
    def coefficients(self) -> Coefficients:
        """The numbers of the method."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Coefficients)}
        if values["alpha_np_test"] is None:
            values["alpha_np_test"] = values["alpha_np"]
        return Coefficients(**values)


Options = HeGraphOptions
