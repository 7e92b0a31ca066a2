"""Folders of compiled code: one for each machine where the disk is shared, with what is built already."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmpeft_ds.distributed import host_caches
from tests.helpers import ROOT, launch

OPERATOR = "deepspeed_shm_comm"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A home and a folder of prebuilt extensions; `machine.local` says whether they are on a disk of this machine."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(host_caches, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(host_caches.socket, "gethostname", lambda: "gpu7")
    (tmp_path / "prebuilt" / "op").mkdir(parents=True)
    for name in ("op.so", "op.o", "lock", ".ninja_log"):
        (tmp_path / "prebuilt" / "op" / name).write_text(name)

    def told(local: bool, **env: str) -> dict[str, str]:
        monkeypatch.setattr(host_caches, "is_on_local_disk", lambda path: local)
        host_caches.set_folders(env)
        return env

    return told


def test_on_a_local_disk_the_folders_stay_where_they_are(machine, tmp_path):
    assert machine(local=True) == {"TORCH_EXTENSIONS_DIR": str(tmp_path / "prebuilt")}


def test_on_a_shared_disk_every_machine_has_its_own_with_what_is_built(machine, tmp_path):
    env = machine(local=False)
    own = tmp_path / "prebuilt" / "hosts" / "gpu7"
    assert env == {
        "TORCH_EXTENSIONS_DIR": str(own),
        "TRITON_CACHE_DIR": str(tmp_path / "home" / ".triton" / "hosts" / "gpu7"),
    }
    assert {path.name for path in (own / "op").iterdir()} == {"op.so", "op.o", ".ninja_log"}, "no lock of another"
    assert {path.name for path in own.iterdir()} == {"op"}, "nothing half copied"
    (own / "op" / "op.so").write_text("rebuilt here")
    machine(local=False)
    assert (own / "op" / "op.so").read_text() == "rebuilt here", "a later start leaves it alone"


def test_without_prebuilt_extensions_the_home_is_divided(machine, tmp_path):
    shutil.rmtree(tmp_path / "prebuilt")
    assert machine(local=False)["TORCH_EXTENSIONS_DIR"] == str(
        tmp_path / "home" / ".cache" / "torch_extensions" / "hosts" / "gpu7"
    )
    assert machine(local=True) == {}, "as torch has it"


def test_what_the_user_sets_stays(machine):
    given = {"TORCH_EXTENSIONS_DIR": "/x", "TRITON_CACHE_DIR": "/y"}
    assert machine(local=False, **given) == given


PROGRAM = """
import os
from mmpeft_ds.distributed import build_lock, host_caches
host_caches.is_on_local_disk = lambda path: False
os.environ.pop("TORCH_EXTENSIONS_DIR")
host_caches.PREBUILT = host_caches.Path({prebuilt!r})
host_caches.set_folders(os.environ)
build_lock.install()  # as every rank does: a finished library is loaded without asking ninja
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
print("loaded from", os.environ["TORCH_EXTENSIONS_DIR"])
"""


def test_the_operator_of_make_setup_is_loaded_from_there_and_not_compiled_again(tmp_path):
    prebuilt = Path(launch.environment()["TORCH_EXTENSIONS_DIR"])
    library = prebuilt / OPERATOR / f"{OPERATOR}.so"
    if not library.is_file():
        pytest.skip("make setup has not built it: a GPU machine")
    folder = tmp_path / "prebuilt"
    shutil.copytree(library.parent, folder / OPERATOR)
    program = PROGRAM.format(prebuilt=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=launch.environment(HOME=str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "loaded from" in done.stdout, done.stderr[-2000:]
    (own,) = (folder / "hosts").glob(f"*/{OPERATOR}/{OPERATOR}.so")
    commands = [(file.parent / "build.ninja").read_text() for file in (library, own)]
    assert own.stat().st_mtime_ns == library.stat().st_mtime_ns, f"it was compiled again, with {commands}"
