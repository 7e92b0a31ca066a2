"""Registration with a library that is imported before, after, or in the middle of our own modules."""

import importlib
import importlib.util
import pickle
import subprocess
import sys

import pytest

import mmpeft_ds
from mmpeft_ds import registration
from tests.helpers import ROOT


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library `harbour`, and a package `fleet` of ours whose modules import it; a watcher for both alone."""
    (tmp_path / "harbour.py").write_text("PIERS = 3\n")
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "__init__.py").touch()
    (tmp_path / "fleet" / "base.py").write_text("from harbour import PIERS\n\nSHIPS = PIERS\n")
    (tmp_path / "fleet" / "tug.py").write_text("from fleet.base import SHIPS\n\nENTRY = SHIPS\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not registration._WATCHER])
    monkeypatch.setattr(registration, "_WATCHER", registration.ImportWatcher())
    monkeypatch.setattr(registration, "OURS", "fleet.")
    yield
    for name in ("harbour", "fleet", "fleet.base", "fleet.tug"):
        sys.modules.pop(name, None)


def test_it_happens_after_the_import_and_after_each_further_one(library):
    calls = []
    registration.when_imported("harbour", lambda: calls.append(sys.modules["harbour"].PIERS))
    assert importlib.util.find_spec("harbour") is not None and not calls, "asking whether it is there imports nothing"
    harbour = importlib.import_module("harbour")
    assert calls == [3]
    importlib.reload(harbour)
    assert calls == [3, 3]


def test_it_happens_at_once_where_the_library_is_there(library):
    importlib.import_module("harbour")
    calls = []
    registration.when_imported("harbour", lambda: calls.append(1))
    assert calls == [1]


def test_a_module_of_ours_that_imports_the_library_first_is_completed_before(library):
    calls = []

    def register():
        calls.append(importlib.import_module("fleet.tug").ENTRY)

    registration.when_imported("harbour", register)
    importlib.import_module("fleet.base")
    assert calls == [3]


def test_without_waiting_the_half_imported_module_would_be_met(library, monkeypatch):
    """Negative control."""
    monkeypatch.setattr(registration, "OURS", "nothing of ours.")
    registration.when_imported("harbour", lambda: importlib.import_module("fleet.tug"))
    with pytest.raises(ImportError, match="SHIPS"):
        importlib.import_module("fleet.base")


def test_an_import_that_fails_registers_nothing(library, tmp_path):
    (tmp_path / "harbour.py").write_text("raise ValueError('storm')\n")
    calls = []
    registration.when_imported("harbour", lambda: calls.append(1))
    with pytest.raises(ValueError, match="storm"):
        importlib.import_module("harbour")
    assert not calls and "harbour" not in sys.modules


def test_the_loader_that_others_see_is_the_one_that_python_chose(library):
    registration.when_imported("harbour", lambda: None)
    harbour = importlib.import_module("harbour")
    assert type(harbour.__loader__) is type(harbour.__spec__.loader) is type(registration.__loader__)
    assert "PIERS = 3" in harbour.__loader__.get_source("harbour")


def test_in_a_new_process_a_pickled_config_brings_every_method(tmp_path):
    """The config's own module imports peft first, in the middle of ours."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(mmpeft_ds.PAdapterConfig(r=4)))
    code = (
        "import gc, pickle, sys\n"
        "gc.disable()  # a fifth of the time of imports\n"
        f"config = pickle.load(open({str(tmp_path / 'config.pkl')!r}, 'rb'))\n"
        "import peft, mmpeft_ds\n"
        "from mmpeft_ds import methods\n"
        "assert config == mmpeft_ds.PAdapterConfig(r=4)\n"
        "types = {methods.get(n).peft_type for n in methods.names()} - {None}\n"
        "missing = types - {*peft.PEFT_TYPE_TO_TUNER_MAPPING}\n"
        "assert not missing, missing\n"
        "assert 'torch_geometric' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
