"""What is trained: one file or folder per paper. Each is registered with peft when `mmpeft_ds` is imported."""

from __future__ import annotations

import sys

import peft.mapping

from mmpeft_ds import registry
from mmpeft_ds.methods.base import Method
from mmpeft_ds.methods.common.head import HeadConfig


def names(heads: bool | None = None) -> list[str]:
    """All methods; with `heads`, only those that score frozen features (True) or attach inside a model (False)."""
    found = registry.names(sys.modules[__name__])
    return [n for n in found if heads is None or issubclass(get(n).Config, HeadConfig) is heads]


def get(name: str, where: str = "method") -> Method:
    """The entry of a method; `where` says in errors who named it. Raises BadInput."""
    return registry.load(sys.modules[__name__], name, where)


def of(config: peft.PeftConfig) -> Method:
    """The entry whose config this is. Raises KeyError."""
    return {str(getattr(get(n).peft_type, "value", get(n).peft_type)): get(n) for n in names()}[
        str(getattr(config.peft_type, "value", config.peft_type))
    ]


def register() -> None:
    """Tell peft about the methods that it does not have itself. May be called again."""
    for name in names():
        method = get(name)
        if method.Tuner is None:
            continue
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] = method.Config
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type] = method.Tuner
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] = method.prefix
