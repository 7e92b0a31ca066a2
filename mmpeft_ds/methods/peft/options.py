"""Options of `peft`: the type, its own fields, and where the sites place it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import MethodOptions
from mmpeft_ds.methods.common.options import SiteOptions
from mmpeft_ds.methods.ia3.options import IA3Options
from mmpeft_ds.methods.lora.options import LoraOptions
from mmpeft_ds.methods.peft.kinds import KINDS, PLACES, Kind

# Types that are methods by themselves, with more checks.
METHODS: dict[str, type[MethodOptions]] = {"lora": LoraOptions, "ia3": IA3Options}


@dataclass
class PeftOptions(SiteOptions):
    """Any type of peft, placed by the sites: q and v of every layer of the text towers, unless it says otherwise."""

    type: str = field(default="", metadata={"help": "Type of peft in small letters, such as `loha`; required."})
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Fields of that type's own config, such as `r`, or `target_modules` in place of sites."},
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": f"Places in each layer: {', '.join(PLACES)}; default q and v for most types."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.type = self.type.lower()
        if self.type and self.type not in KINDS:
            near = difflib.get_close_matches(self.type, KINDS, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            self._refuse("type", f"peft has no {self.type!r}. {hint}Known: {', '.join(KINDS)}.")
        if self.targets is not None:
            self._some_of("targets", PLACES)
        placed = {"tower": self.tower, "layers": self.layers, "targets": self.targets}
        for name, value in placed.items():
            if value is not None and "target_modules" in self.options:
                self._refuse(name, "options.target_modules already says where. Leave one of them out.")

    @property
    def kind(self) -> Kind:
        """Facts about the type. Raises BadInput where none is named."""
        if not self.type:
            self._refuse("type", f"is missing. Name one of {', '.join(KINDS)}.")
        return KINDS[self.type]

    def check_training(self, dtype: str, stage: int) -> None:
        """Refuse a type, or an option of it, that cannot train here. Raises BadInput."""
        kind = self.kind
        if kind.refused:
            self._refuse("type", f"{self.type} is not offered: {kind.refused}.")
        if stage == 3 and kind.stage3:
            self._refuse("type", f"{self.type} is not offered at ZeRO stage 3: {kind.stage3}. Use stage 2 or below.")
        for (name, value), reason in kind.options.items():
            if self.options.get(name) == value:
                self._refuse(f"options.{name}", f"{value!r} is not offered: {reason}. Leave it out.")
        self._check_whole_modules(self.modules_to_save, dtype)
        if self.type in METHODS:
            known = METHODS[self.type].own_fields()
            given = {name: value for name, value in self.options.items() if name in known}
            try:
                METHODS[self.type](**given).check_training(dtype, stage)
            except BadInput as error:
                raise BadInput(f"options.{error}") from error


Options = PeftOptions
