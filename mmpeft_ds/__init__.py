"""Parameter-efficient tuning of large frozen vision-language models on DeepSpeed.

Importing this package registers every method with peft; `load` rebuilds base and adapter from an adapter directory.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmpeft_ds import methods

__version__ = "0.1.0"

methods.register()
# Every method's config under its own name: mmpeft_ds.RoutedLoraConfig, ...
_CONFIGS = {methods.get(name).Config.__name__: methods.get(name).Config for name in methods.names()}
_LAZY = {"load": "mmpeft_ds.adapter"}

__all__ = ["__version__", *_LAZY, *_CONFIGS]


def __getattr__(name: str) -> Any:
    if name in _CONFIGS:
        return _CONFIGS[name]
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
