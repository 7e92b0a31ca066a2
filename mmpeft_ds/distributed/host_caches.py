"""Folders of compiled code, one for each machine where the disk is shared by many."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from mmpeft_ds.files import REPOSITORY, is_on_local_disk

PREBUILT = REPOSITORY / ".cache" / "torch_extensions"  # by `make setup`


def set_folders(env: Any) -> None:
    """Set TORCH_EXTENSIONS_DIR and TRITON_CACHE_DIR where the user did not.

    torch lets one process build an extension and all others wait for its lock file. On a file system that machines
    share, the ranks of all nodes would wait for one of them, and for ever if that one is killed.
    """
    if "TORCH_EXTENSIONS_DIR" not in env:
        folder = PREBUILT if PREBUILT.is_dir() else Path.home() / ".cache" / "torch_extensions"
        if not is_on_local_disk(folder):
            env["TORCH_EXTENSIONS_DIR"] = str(_of_this_host(folder))
        elif folder == PREBUILT:
            env["TORCH_EXTENSIONS_DIR"] = str(folder)
    triton = Path.home() / ".triton"
    if not is_on_local_disk(triton):
        env.setdefault("TRITON_CACHE_DIR", str(triton / "hosts" / socket.gethostname()))


def _of_this_host(shared: Path) -> Path:
    """The folder of this machine below `shared`, with the extensions that are built there already.

    They are copied with their times, so that ninja finds nothing to do.
    """
    own = shared / "hosts" / socket.gethostname()
    own.mkdir(parents=True, exist_ok=True)
    for built in sorted(shared.glob("*/*.so")):
        if built.parent.parent == shared:
            _copy(built.parent, own / built.parent.name)
    return own


def _copy(source: Path, target: Path) -> None:
    """Copy a folder whole or not at all; whichever rank of this machine is first gives it its name."""
    if any(target.glob("*.so")):
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as folder:
        copy = Path(folder) / source.name
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("lock"))
        with contextlib.suppress(OSError):  # another rank was first: a folder that is not empty stays
            copy.rename(target)
