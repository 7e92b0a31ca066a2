"""Entries of a folder of components: one file or one sub-folder per entry, found by name, nothing lists them by hand.

An entry that is a file exports `ENTRY` and `Options`. A folder exports `ENTRY` from the file that bears the kind's
name, such as `backbones/blip/backbone.py` (where there is no such file, from its `__init__.py`), and `Options` from
`options.py`, which imports neither torch nor transformers nor peft. Like every package, a folder needs an
`__init__.py`, which may be empty.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mmpeft_ds.errors import BadInput

NO_ENTRIES = {"base", "common"}


def names(package: ModuleType) -> list[str]:
    """Entry names of `package`, sorted: its modules and sub-packages except `base`, `common` and private ones."""
    modules = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(filter(_may_be_entry, modules))


def load(package: ModuleType, name: str, where: str) -> Any:
    """`ENTRY` of the file or folder `name` in `package`.

    Raises:
        BadInput: if there is no such entry, or its file exports no `ENTRY`; `where` says which key of the recipe
            named it.
    """
    module = _module(package, name, where)
    kind = package.__name__.rsplit(".", 1)[-1].removesuffix("s")
    inner = f"{module}.{kind}"
    holder = importlib.import_module(inner if _is_there(inner) else module)
    try:
        return holder.ENTRY
    except AttributeError:
        raise BadInput(f"{where}: {holder.__name__} exports no ENTRY. Write `ENTRY = YourClass` at its end.") from None


def options(package: ModuleType, name: str, where: str) -> type:
    """The `Options` dataclass of the entry `name`; that of a folder is read without importing the folder's layers.

    Raises:
        BadInput: if there is no such entry; `where` says which key of the recipe named it.
    """
    module = _module(package, name, where)
    inner = f"{module}.options"
    holder = importlib.import_module(inner if _is_there(inner) else module)
    # A folder without options.py keeps them on its entry.
    return holder.Options if hasattr(holder, "Options") else load(package, name, where).Options


def lazy_names(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of an entry's folder: `from mmpeft_ds.tasks.retrieval import Retrieval` finds the name in
    the file of the folder that defines it, options first, and nothing is imported before somebody asks.
    """

    def find(name: str) -> Any:
        path = importlib.import_module(package).__path__
        files = sorted((m.name for m in pkgutil.iter_modules(path)), key=lambda file: (file != "options", file))
        if not name.startswith("__") and name not in files:
            for file in files:
                module = importlib.import_module(f"{package}.{file}")
                if name in vars(module):
                    return vars(module)[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def _may_be_entry(name: str) -> bool:
    return not name.startswith("_") and name not in NO_ENTRIES


def _module(package: ModuleType, name: str, where: str) -> str:
    module = f"{package.__name__}.{name}"
    if module in sys.modules and _may_be_entry(name):  # the folder need not be read again
        return module
    known = names(package)
    if name not in known:
        if name.isidentifier() and name not in NO_ENTRIES and _has_code(package, name):
            raise BadInput(f"{where}: the folder {name} of {package.__name__} has no __init__.py. Add an empty one.")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        kind = package.__name__.rsplit(".", 1)[-1].removesuffix("s")
        raise BadInput(f"{where}: no {kind} named {name!r}. {hint}Known: {', '.join(known)}.")
    return module


def _has_code(package: ModuleType, folder: str) -> bool:
    return any(file for parent in package.__path__ for file in (Path(parent) / folder).glob("*.py"))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent is a file and has nothing below it
        return False
