"""Options of (IA)^3: the fields of peft's own config that a recipe may set, with peft's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmpeft_ds.methods.base import MethodOptions


@dataclass
class IA3Options(MethodOptions):
    """k and v of every layer of the text towers, and what the feed-forward block narrows, unless `target_modules` says
    otherwise."""

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules; default as above."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    feedforward_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Those of the modules whose input is scaled, not their output."}
    )
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are stored in x out (found without it)."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full with the adapter."}
    )
    init_ia3_weights: bool = field(default=True, metadata={"help": "Start as the frozen model."})

    def check_training(self, dtype: str, stage: int) -> None:
        """Refuse what would train in half precision. Raises BadInput."""
        self._check_whole_modules(self.modules_to_save, dtype)


Options = IA3Options
