"""What the configs of the baselines share: where, and what trains whole beside."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig

from mmpeft_ds.errors import BadInput


def check_types(config: PeftConfig) -> None:
    """Raise BadInput if a field that `config` adds to peft's is not of its declared type: peft builds configs from
    whatever a call or a file says, and a text in place of a list of patterns would match letter by letter. Fields of a
    few words are left to the config, which names them."""
    hints, inherited = typing.get_type_hints(type(config)), PeftConfig.__dataclass_fields__
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if f.name not in inherited and typing.get_origin(hint) is not typing.Literal and not _fits(value, hint):
            raise BadInput(f"{f.name}: expected {f.type}, got {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """As in recipes: 1 stands for 1.0 but not for true, a tuple for a list."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    if inner:
        return any(_fits(value, one) for one in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


@dataclass
class SiteConfig(PeftConfig):
    """Fields of a method that attaches to the sites of one tower or of several. A subclass sets `PEFT_TYPE`."""

    PEFT_TYPE: ClassVar[str] = ""
    target_modules: ClassVar[None] = None  # peft reads it; the sites say where, not a list of names

    tower: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Path of the tower, or `text` or `image`, or a list of these ([text] is encoder and decoder of "
            "BART); default the text tower, or the only tower."
        },
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Layer indices of the tower; default all."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapter, such as the head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.PEFT_TYPE
        check_types(self)

    def _one_of(self, key: str, known: Sequence[str]) -> None:
        given = getattr(self, key)
        for value in [given] if isinstance(given, str) else given:
            if value not in known:
                raise BadInput(f"{key}: {value!r} is unknown. Known: {', '.join(known)}.")

    def _some_of(self, key: str, known: Sequence[str]) -> None:
        self._one_of(key, known)
        given = getattr(self, key)
        if not given or len(set(given)) != len(given):
            raise BadInput(f"{key}: {given} must name at least one of {', '.join(known)}, each once.")

    def _at_least(self, key: str, least: int) -> None:
        if getattr(self, key) < least:
            raise BadInput(f"{key}: must be {least} or more, got {getattr(self, key)}.")
