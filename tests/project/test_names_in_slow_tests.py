"""Names that slow tests, which few people run, use in modules of this repository: a move is noticed at once."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType

import pytest

from tests.helpers import ROOT

OURS = ("mmpeft_ds", "launchers", "data_prep", "tests")
FILES = sorted(
    path
    for path in (ROOT / "tests").rglob("*.py")
    if path.parent.name == "rank_scripts"
    or "mark.slow" in path.read_text()
    and path.name != "test_names_in_slow_tests.py"
)


def imported_modules(tree: ast.Module) -> dict[str, ModuleType]:
    """Modules of this repository that a file imports with `from PACKAGE import MODULE`, by their name in the file."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            package = importlib.import_module(node.module)
            for alias in node.names:
                # importing makes a submodule an attribute of its package; anything else has to be one already
                if not hasattr(package, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(member := getattr(package, alias.name), ModuleType):
                    modules[alias.asname or alias.name] = member
    return modules


def missing_names(source: str) -> list[str]:
    """`MODULE.NAME` for each attribute of an imported module that `source` uses and that is not there."""
    tree = ast.parse(source)
    modules = imported_modules(tree)
    return [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id in modules and not hasattr(modules[node.value.id], node.attr)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_name_is_there(path):
    assert missing_names(path.read_text()) == []


def test_a_name_that_moved_is_noticed():
    assert missing_names("from tests.helpers import launch\nlaunch.gone()\nlaunch.run()") == ["launch.gone"]
    with pytest.raises(ModuleNotFoundError):
        missing_names("from tests.helpers import gone")
