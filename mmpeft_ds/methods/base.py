"""What a method must offer: a peft config and tuner, registered with peft, plus a little for recipes.

One file or folder per paper; `ENTRY` in it is a class that satisfies `Method`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from peft import PeftConfig
from torch import nn

from mmpeft_ds.sites.base import Sites


@runtime_checkable
class Method(Protocol):
    """What is trained.

    Attributes:
        peft_type: key under which the tuner is registered with peft; peft's own for its methods (`LORA`).
        Config: the `peft.PeftConfig` dataclass; the recipe's `method` section gives its fields.
        Tuner: the `BaseTuner` class, or None when peft already has it.
        prefix: what names of its parameters contain (peft needs it to find them in a state dict).
        mergeable: the trained delta can be folded into the base weights.
    """

    peft_type: ClassVar[str]
    Config: ClassVar[type[PeftConfig]]
    Tuner: ClassVar[type | None]
    prefix: ClassVar[str]
    mergeable: ClassVar[bool]

    @staticmethod
    def check(config: PeftConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when the config cannot work on these sites (unequal widths, no condition, no such layer)."""

    @staticmethod
    def prepare(config: PeftConfig, model: nn.Module, sites: Sites) -> PeftConfig:
        """Fill what depends on the model (target paths) and return the config that peft gets."""

    @staticmethod
    def kinds(names: list[str]) -> dict[str, Any]:
        """Sort trainable parameter names into `peft`, `norm`, `bias`, `head` for the summary."""


class Decaying(Protocol):
    """What a method offers besides, if weight decay is to reach vectors: the engine decays matrices alone."""

    @staticmethod
    def decays(config: PeftConfig, name: str) -> bool:
        """Whether the trained vector of this name decays."""
