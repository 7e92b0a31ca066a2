"""Registration with a library as soon as that is imported, so that nothing of ours has to import it for that alone.

Methods are registered with peft, the composed models of backbones with the Auto classes of transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

OURS = f"{__name__.partition('.')[0]}."


def when_imported(library: str, register: Callable[[], Any], at_once: bool = False) -> None:
    """Call `register` now if `library` has been imported, else after each import of it.

    Args:
        library: name of the module, such as peft.
        at_once: even while modules of ours are half imported; for a `register` that imports none of them.
    """
    loaded = sys.modules.get(library)
    if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
        register()
    _WATCHER.waiting.append(_Waiting(library, register, at_once))
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)


def register_model(package: str) -> None:
    """Import `model.py` of the backbone `package`, which registers its classes with the Auto classes of transformers,
    as soon as transformers is imported."""
    when_imported("transformers", lambda: importlib.import_module(f"{package}.model"))


@dataclass
class _Waiting:
    """A registration that waits for a library.

    Our own modules import the library too, and registration imports many of ours. So where one of ours was first,
    registration waits until no module of ours is half imported.
    """

    library: str
    register: Callable[[], Any]
    at_once: bool
    running: int = 0  # imports of the library and of our own modules that have not ended
    due: bool = False

    def concerns(self, name: str) -> bool:
        """Whether the import of this module may make the registration due, or delay it."""
        return name == self.library or (name.startswith(OURS) and not self.at_once)

    @contextlib.contextmanager
    def importing(self, name: str) -> Iterator[None]:
        """Around the execution of a module: register after the last one, if the library was among them."""
        self.running += 1
        try:
            yield
            self.due |= name == self.library
        finally:
            self.running -= 1
        if self.due and not self.running:
            self.due = False
            self.register()


class ImportWatcher(importlib.abc.MetaPathFinder):
    """Finder that leaves finding to the others and learns from them what is being imported."""

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give for a module that some registration waits for; else None."""
        if not any(waiting.concerns(name) for waiting in self.waiting):
            return None
        others = (finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for find in others if (spec := find(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def run(self, loader: Any, module: ModuleType) -> None:
        """Execute `module`, and what becomes due by it."""
        with contextlib.ExitStack() as stack:
            for waiting in list(self.waiting):
                if waiting.concerns(module.__name__):
                    stack.enter_context(waiting.importing(module.__name__))
            loader.exec_module(module)


class _Loader(importlib.abc.Loader):
    """The loader of one module, which reports to the watcher and then steps aside."""

    def __init__(self, loader: Any, watcher: ImportWatcher):
        self.loader = loader
        self.watcher = watcher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.watcher.run(self.loader, module)


_WATCHER = ImportWatcher()
