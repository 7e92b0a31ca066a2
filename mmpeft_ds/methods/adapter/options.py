"""Options of bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import ACTIVATIONS, SUBLAYERS, SiteOptions


@dataclass
class AdapterOptions(SiteOptions):
    """`scale * up(activation(down(t)))` added to the output of a sublayer, before the residual add; t is that output
    (`sequential`) or the sublayer's input (`parallel`)."""

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    style: Literal["sequential", "parallel"] = field(
        default="sequential",
        metadata={"help": "After the sublayer, residual inside; or beside it, reading what its first layer does."},
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "Which sublayers: self, cross, ffn; default all that the chosen layers have."},
    )
    activation: str | None = field(
        default=None,
        metadata={"help": "Non-linearity (gelu, gelu_new, relu, silu, ...); default that of the backbone."},
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of what is added."})
    near_identity: bool = field(
        default=True,
        metadata={"help": "`up` starts at zero, so the model starts as the frozen one; else from N(0, 0.02)."},
    )
    train_norms: bool | list[str] = field(
        default=False,
        metadata={"help": "Train copies of the norms of the chosen layers, or of those matching full-path patterns."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        if self.after is not None:
            self._some_of("after", SUBLAYERS)
        if self.activation is not None:
            self._one_of("activation", ACTIVATIONS)


Options = AdapterOptions
