"""Options of TensLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import PROJECTIONS, SiteOptions

MODES = ("heads", "projections", "layers")


@dataclass
class TensLoraOptions(SiteOptions):
    """The updates of many projections as slices of one tensor: input x output x what `modes` names.

    Source: Marmoret, Bensaid, Lys, Gripon, Leduc-Primeau, arXiv 2509.19391.
    """

    r: int | list[int] = field(
        default=16,
        metadata={"help": "Rank; with form tucker also a list: of input, output, and each of `modes` in turn."},
    )
    form: Literal["tucker", "cp"] = field(
        default="tucker", metadata={"help": "A full core between the factors, or one weight for each rank."}
    )
    modes: list[Literal["heads", "projections", "layers"]] = field(
        default_factory=lambda: ["projections", "layers"],
        metadata={
            "help": "What one tensor spans beside input and output: the heads of an attention, its projections, the "
            "layers of a tower. What is left out has tensors of its own."
        },
    )
    targets: list[str] = field(
        default_factory=lambda: ["q", "k", "v"],
        metadata={"help": "Which projections of an attention site: q, k, v, out."},
    )
    start: Literal["orthogonal", "kaiming_uniform", "normal"] = field(
        default="orthogonal",
        metadata={"help": "How factors start; the core (tucker) or the input factor (cp) starts at zero."},
    )
    scale: float = field(default=1.0, metadata={"help": "Multiplies what is added."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the input of the update."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._some_of("targets", PROJECTIONS)
        self._some_of("modes", MODES)
        self._share("dropout", below=True)
        if self.form == "cp" and not isinstance(self.r, int):
            self._refuse("r", "form cp has one rank for all modes; give one number.")
        given = [self.r] if isinstance(self.r, int) else self.r
        if not all(rank >= 1 for rank in given):
            self._refuse("r", f"every rank must be 1 or more, got {self.r}.")
        if isinstance(self.r, list) and len(self.r) != 2 + len(self.modes):
            self._refuse(
                "r", f"{self.r} must be {2 + len(self.modes)} ranks: input, output, {', '.join(self.ordered_modes)}."
            )

    @property
    def ordered_modes(self) -> list[str]:
        """`modes` in the order of the tensor's axes."""
        return [mode for mode in MODES if mode in self.modes]

    @property
    def ranks(self) -> list[int]:
        """Rank of every mode: input, output, then those of `ordered_modes`."""
        return self.r if isinstance(self.r, list) else [self.r] * (2 + len(self.modes))


Options = TensLoraOptions
