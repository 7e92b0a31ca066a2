"""Methods, one folder each. They are registered with peft when both `mmpeft_ds` and peft are imported."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mmpeft_ds import registry

if TYPE_CHECKING:  # names and options are asked for without torch and peft
    from peft import PeftConfig

    from mmpeft_ds.methods.base import MethodOptions, SiteMethod

THIS = sys.modules[__name__]


def names(heads: bool | None = None) -> list[str]:
    """All methods; with `heads`, only those that score frozen features (True) or attach inside a model (False)."""
    return [n for n in registry.names(THIS) if heads is None or options(n).scores_features is heads]


def options(name: str, where: str = "method") -> type[MethodOptions]:
    """The options of a method, read without torch and peft; `where` says in errors who named it. Raises BadInput."""
    return registry.options(THIS, name, where)


def get(name: str, where: str = "method") -> type[SiteMethod]:
    """The entry of a method; `where` says in errors who named it. Raises BadInput."""
    return registry.load(THIS, name, where)


def of(config: PeftConfig) -> type[SiteMethod]:
    """The entry whose config this is: `peft` for a type of peft that has no entry of its own."""
    entries = {get(name).peft_type: get(name) for name in names()}
    return entries.get(config.peft_type, entries[None])


def configs() -> dict[str, str]:
    """Name of each public config (`RoutedLoraConfig`) -> name of its method.

    It follows from the name of the options (`RoutedLoraOptions`), so this imports neither torch nor peft.
    """
    return {options(name).__name__.removesuffix("Options") + "Config": name for name in names()}


def register() -> None:
    """Tell peft about the methods that it does not have itself. May be called again."""
    import peft.mapping

    for name in names():
        method = get(name)
        if method.Tuner is None:
            continue
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type] = method.Config
        peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[method.peft_type] = method.Tuner
        peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[method.peft_type] = method.prefix
