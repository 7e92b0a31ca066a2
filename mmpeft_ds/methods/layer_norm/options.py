"""Options of LayerNorm tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import SiteOptions


@dataclass
class LayerNormOptions(SiteOptions):
    """Copies of norms, held by the adapter and trained; the frozen ones stay what they are."""

    norms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full module paths, such as [*.ln_1], anywhere in the model; default the "
            "norms of the chosen layers of the tower."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norms is not None and (self.layers is not None or self.tower is not None):
            raise BadInput("norms: patterns choose from the whole model. Leave out tower and layers.")


Options = LayerNormOptions
