"""Options of adapters with one `down` for all towers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import ACTIVATIONS, SUBLAYERS, SiteOptions


@dataclass
class UniAdapterOptions(SiteOptions):
    """`scale * up(activation(down(t)))` added to the output t of a sublayer; `down` is shared by all places of one
    width in one layer (or in all layers), `up` is of each place its own."""

    tower: str | list[str] | None = field(
        default=None,
        metadata={"help": "Path of the tower, or `text` or `image`, or a list of these; default all towers."},
    )
    r: int = field(default=128, metadata={"help": "Width of the bottleneck."})
    share: Literal["layer", "all"] = field(
        default="layer",
        metadata={"help": "One `down` for each layer index, or for the whole model; always one for each width."},
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "Which sublayers: self, cross, ffn; default the attention sublayers that there are."},
    )
    activation: str | None = field(
        default=None, metadata={"help": "Non-linearity (gelu, relu, silu, ...); default that of the backbone."}
    )
    scale: float = field(default=1.0, metadata={"help": "Factor of what is added."})
    near_identity: bool = field(
        default=True,
        metadata={"help": "`up` starts at zero, so the model starts as the frozen one; else from N(0, 0.02)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        if self.after is not None:
            self._some_of("after", SUBLAYERS)
        if self.activation is not None:
            self._one_of("activation", ACTIVATIONS)


Options = UniAdapterOptions
