"""Find the entries of a folder: one file = one entry, named after the file, exported as `ENTRY`.

A new backbone, task, method or data source is one new file in its folder; nothing lists them by hand.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from types import ModuleType
from typing import Any

from mmpeft_ds.errors import BadInput


def names(package: ModuleType) -> list[str]:
    """Entry names of `package`, sorted: its modules and sub-packages except `base` and those that begin with `_`."""
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in found if not n.startswith("_") and n != "base")


def load(package: ModuleType, name: str, where: str) -> Any:
    """`ENTRY` of the file `name` in `package`.

    Raises:
        BadInput: if there is no such file; `where` says which key of the recipe named it.
    """
    known = names(package)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        kind = package.__name__.rsplit(".", 1)[-1]
        raise BadInput(f"{where}: no {kind} entry named {name!r}. {hint}Known: {', '.join(known)}.")
    return importlib.import_module(f"{package.__name__}.{name}").ENTRY
