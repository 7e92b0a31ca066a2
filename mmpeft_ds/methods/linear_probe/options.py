"""Options of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mmpeft_ds.methods.common.options import HeadOptions


@dataclass
class LinearProbeOptions(HeadOptions):
    """Solved once (`lbfgs`), or trained like any other head (`gradient`)."""

    method: ClassVar[str] = "linear_probe"

    solver: Literal["lbfgs", "gradient"] = field(
        default="lbfgs",
        metadata={"help": "`lbfgs` solves for all training rows at once; `gradient` trains step by step."},
    )
    inputs: Literal["image", "text", "both"] = field(
        default="image", metadata={"help": "What it reads: `image`, `text` (a caption's features), or `both` joined."}
    )
    strength: float | None = field(
        default=None,
        metadata={"help": "C of the regression, 1 / weight of its penalty; default: searched on validation."},
    )
    halvings: int = field(default=8, metadata={"help": "Halvings of the search of C after its coarse grid."})
    max_iter: int = field(default=1000, metadata={"help": "Iterations of L-BFGS at most."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is not None and not 0 < self.strength < float("inf"):
            self._refuse("strength", f"must be above 0, got {self.strength}.")
        self._at_least("halvings", 0)
        self._at_least("max_iter", 1)

    @property
    def gradient_free(self) -> bool:
        return self.solver == "lbfgs"

    @property
    def needs_validation(self) -> bool:
        return self.gradient_free and self.strength is None

    @property
    def reads_captions(self) -> bool:
        return self.inputs != "image"


Options = LinearProbeOptions
