"""Parameter-efficient tuning of large frozen vision-language models on DeepSpeed.

Importing this package registers every method with peft, or, where peft has not been imported, sees to it that this
happens when it is. It imports neither torch nor transformers nor peft itself, so that commands answer at once. `load`
rebuilds base and adapter from an adapter directory; the configs of the methods are here under their names.
"""

from __future__ import annotations

import importlib
from typing import Any

from mmpeft_ds import methods
from mmpeft_ds.registration import when_imported

__version__ = "0.1.0"

_LAZY = {"load": "mmpeft_ds.adapter"}

when_imported("peft", methods.register)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name == "__all__":
        return __dir__()
    if name.endswith("Config") and (method := methods.configs().get(name)):
        return methods.get(method).Config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_LAZY, *methods.configs()])
