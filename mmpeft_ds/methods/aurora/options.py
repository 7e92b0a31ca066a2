"""Options of Aurora."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import MethodOptions

TARGETS = ("q", "k", "v", "out", "fc1", "fc2")


@dataclass
class AuroraOptions(MethodOptions):
    """One (down, core, up) for the updates of all layers; a layer owns only its modes, and the gates of a text layer.

    Source: Aurora, NeurIPS 2023, arXiv 2305.08381.
    """

    r: int = field(default=32, metadata={"help": "Rank; the full core has r^3 numbers."})
    form: Literal["tucker", "cp"] = field(
        default="tucker",
        metadata={"help": "Core: a full r x r x r tensor as in the released code, or its superdiagonal alone."},
    )
    image_targets: list[str] = field(
        default_factory=lambda: ["q", "k", "v", "out", "fc1", "fc2"],
        metadata={"help": "Adapted maps of image layers: q, k, v, out, fc1, fc2."},
    )
    text_targets: list[str] = field(
        default_factory=lambda: ["q", "k", "v"],
        metadata={"help": "Adapted maps of text layers, of self- and of cross-attention: q, k, v, out, fc1, fc2."},
    )
    towers: list[str] | None = field(
        default=None, metadata={"help": "Paths of towers, or `text`, `image` for all of a kind; default all."}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "Layer indices, the same in every tower; default all."}
    )
    scale: float = field(
        default=1.0, metadata={"help": "Multiplies what is added to out, fc1 and fc2 of image layers, as published."}
    )
    scale_all: bool = field(default=False, metadata={"help": "Let `scale` multiply all that is added, everywhere."})
    dropout: float = field(
        default=0.1,
        metadata={
            "help": "In the bottleneck, each map with a mask of its own: after the core in image towers, before it in "
            "text towers, as published."
        },
    )
    gates: bool | None = field(
        default=None,
        metadata={
            "help": "Gated query transformation of text layers that have cross-attention and end in a LayerNorm: true "
            "demands that there are such layers, false leaves it out; default wherever there are some."
        },
    )
    gate_std: float = field(
        default=2e-4, metadata={"help": "The gates start normal with this deviation: near the frozen model; 0: at it."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full with the adapter, such as projections and heads."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("image_targets", "text_targets"):
            given = getattr(self, key)
            self._one_of(key, TARGETS)
            if len(set(given)) != len(given):
                raise BadInput(f"{key}: {given} must name each map once.")
        if not self.image_targets and not self.text_targets:
            raise BadInput("image_targets, text_targets: both are empty. Name at least one map.")
        self._at_least("r", 1)
        self._share("dropout", below=True)
        self._at_least("gate_std", 0)


Options = AuroraOptions
