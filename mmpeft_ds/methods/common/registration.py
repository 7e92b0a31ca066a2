"""Registration of the methods with peft as soon as peft is there, so that `import mmpeft_ds` need not import it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

OURS = "mmpeft_ds.methods."


def when_peft_is_there(register: Callable[[], None]) -> None:
    """Call `register` now if peft has been imported, else after each import of it."""
    loaded = sys.modules.get("peft")
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        register()
    sys.meta_path.insert(0, PeftWatcher(register))


class PeftWatcher(importlib.abc.MetaPathFinder):
    """Finder that leaves finding to the others and learns from them when peft has been imported.

    Our own modules import peft too, and registration imports them all. So where one of ours was first, registration
    waits until that one is complete.

    Args:
        register: is called once for every import of peft.
    """

    def __init__(self, register: Callable[[], None]):
        self.register = register
        self.running = 0  # imports of peft and of our own modules that have not ended
        self.due = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give for peft and for modules of methods; None for everything else."""
        if name != "peft" and not name.startswith(OURS):
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for find in others if (spec := find(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def run(self, loader: Any, module: ModuleType) -> None:
        """Execute `module`; register if peft has come with it and no other import is under way."""
        self.running += 1
        try:
            loader.exec_module(module)
            self.due |= module.__name__ == "peft"
        finally:
            self.running -= 1
        if self.due and not self.running:
            self.due = False
            self.register()


class _Loader(importlib.abc.Loader):
    """The loader of one module, which reports to the watcher and then steps aside."""

    def __init__(self, loader: Any, watcher: PeftWatcher):
        self.loader = loader
        self.watcher = watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.watcher.run(self.loader, module)
