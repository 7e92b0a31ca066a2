"""What the configs of the baselines share: where, and what trains whole beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from mmpeft_ds.errors import BadInput


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
