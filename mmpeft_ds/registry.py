"""Entries of a folder of components: one file or one sub-folder per entry, found by name, nothing lists them by hand.

An entry that is a file exports `ENTRY`. An entry that is a folder exports it from the file that bears the kind's name:
`backbones/blip/backbone.py`; where there is no such file, from its `__init__.py`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any

from mmpeft_ds.errors import BadInput

NO_ENTRIES = {"base", "common"}


def names(package: ModuleType) -> list[str]:
    """Entry names of `package`, sorted: its modules and sub-packages except `base`, `common` and private ones."""
    modules = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in modules if not n.startswith("_") and n not in NO_ENTRIES)


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
    module = f"{package.__name__}.{name}"
    kind = package.__name__.rsplit(".", 1)[-1].removesuffix("s")
    inner = f"{module}.{kind}"
    return importlib.import_module(inner if _is_there(inner) else module).ENTRY


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent is a file and has nothing below it
        return False
