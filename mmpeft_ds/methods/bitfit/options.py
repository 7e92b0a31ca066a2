"""Options of BitFit."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import SiteOptions


@dataclass
class BitFitOptions(SiteOptions):
    """Copies of biases, held by the adapter and trained; the frozen ones stay what they are."""

    biases: list[str] | None = field(
        default=None,
        metadata={
            "help": "Shell-style patterns of full module paths, such as [*.query, *.value], anywhere in the model; "
            "default every Linear, Conv1D and norm with a bias in the chosen layers of the tower."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.biases is not None and (self.layers is not None or self.tower is not None):
            raise BadInput("biases: patterns choose from the whole model. Leave out tower and layers.")


Options = BitFitOptions
