"""Bases of the peft configs: options of a method joined with the fields that every peft config has."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import HeadOptions
from mmpeft_ds.recipe import elsewhere


class PeftTypeName(str):
    """Name of a method that peft's own enumeration does not have; peft's messages ask for `value`."""

    @property
    def value(self) -> str:
        return str(self)


class UnknownField(BadInput, TypeError):  # noqa: N818 - peft catches the TypeError and reads its words
    """A config was called with a keyword that it does not have."""


@dataclass
class MethodConfig(PeftConfig):
    """Base of a method's peft config, which names its options first: `class MyConfig(MyOptions, MethodConfig)`.

    Attributes:
        PEFT_TYPE: the name under which peft knows the method.
    """

    PEFT_TYPE: ClassVar[str] = ""
    # Peft reads both of every config; the sites say where, and heads train nothing whole.
    target_modules: ClassVar[None] = None
    modules_to_save: ClassVar[None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> MethodConfig:
        known = {f.name for f in dataclasses.fields(cls)}
        for name in kwargs:
            if name not in known:
                own = list(cls.own_fields())
                near = difflib.get_close_matches(name, own, n=1)
                hint = elsewhere.option_hint(name, own) or (f"Did you mean {near[0]!r}? " if near else "")
                raise UnknownField(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}. {hint}Known: {', '.join(own)}."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftTypeName(self.PEFT_TYPE)


@dataclass
class HeadConfig(HeadOptions, MethodConfig):
    """Base of the peft config of a head: `class MyConfig(MyOptions, HeadConfig)`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.PEFT_TYPE = cls.method.upper()
