"""Entries of a folder of components: what is found, and what a new component that lacks a part is told."""

import sys
from types import ModuleType

import pytest

from mmpeft_ds import registry
from mmpeft_ds.errors import BadInput


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `mills` with an entry that is a file and one that is a folder."""
    made = ModuleType("mills")
    made.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "mills", made)
    (tmp_path / "wind.py").write_text("class Options: ...\n\n\nENTRY = Options\n")
    (tmp_path / "water").mkdir()
    (tmp_path / "water" / "options.py").write_text("class Options: ...\n")
    (tmp_path / "water" / "mill.py").write_text("ENTRY = 3\n")
    yield made
    for name in [name for name in sys.modules if name.startswith("mills.")]:
        del sys.modules[name]


def test_a_folder_without_init_is_named_and_with_an_empty_one_it_is_an_entry(package, tmp_path):
    for ask in (registry.load, registry.options):
        with pytest.raises(BadInput, match=r"^mill.name: the folder water of mills has no __init__.py. Add an empty"):
            ask(package, "water", "mill.name")
    (tmp_path / "water" / "__init__.py").touch()
    assert registry.names(package) == ["water", "wind"] and registry.load(package, "water", "mill.name") == 3


@pytest.mark.parametrize("name", ["steam", "", "left_over", "common"])
def test_what_is_no_folder_with_code_is_simply_unknown(package, tmp_path, name):
    for folder in ("left_over/__pycache__", "common"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "common" / "shared.py").touch()
    with pytest.raises(BadInput, match=f"no mill named '{name}'. Known: wind.$"):
        registry.load(package, name, "mill.name")


def test_a_file_without_an_entry_is_told_what_to_write(package, tmp_path):
    (tmp_path / "sail.py").write_text("class Options: ...\n")
    with pytest.raises(BadInput, match=r"^mill.name: mills.sail exports no ENTRY. Write `ENTRY = YourClass`"):
        registry.load(package, "sail", "mill.name")
    assert registry.load(package, "wind", "mill.name") is registry.options(package, "wind", "mill.name")
