"""Importing what a run imports, in a child: a package that crashes or hangs takes no rank with it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.metadata
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence

import mmpeft_ds
from mmpeft_ds.files import REPOSITORY

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "webdataset", "torch_geometric")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
RUN = "mmpeft_ds.engine.trainer"  # imports all that training needs


class Probe:
    """A child that imports modules one after the other; begin it before this process has started any thread.

    Args:
        names: modules.
    """

    def __init__(self, names: Sequence[str] = (*PACKAGES, RUN)):
        self.names = names
        self.reading, writing = os.pipe()
        parent, self.child = os.getpid(), os.fork()
        if self.child == 0:
            os.close(self.reading)
            _end_with(parent)
            _import_all(names, writing)
        os.close(writing)

    def result(
        self, patience: float, working: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Wait for the child, and end it.

        Args:
            patience: seconds that one module may take from now on.
            working: called every second.

        Returns:
            version of every module that could be imported, and the reason for every other one that was tried.
        """
        text, late = _read(self.reading, patience, working)
        os.close(self.reading)
        os.kill(self.child, signal.SIGKILL)
        status = os.waitpid(self.child, 0)[1]
        results = [json.loads(line) for line in text.split("\n")[:-1]]
        versions = {name: version for name, version, reason in results if not reason}
        failed = {name: reason for name, _, reason in results if reason}
        for name in self.names[len(results) : len(results) + 1]:
            how = (
                f"was not done within {patience:g} s" if late else f"ended the process (signal {os.WTERMSIG(status)})"
            )
            failed[name] = f"importing it {how}"
        return versions, failed


def _end_with(parent: int) -> None:
    """In the child: end when `parent` ends, so that a rank that ends early leaves no child."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above: the signal will not come
        os._exit(2)


def _import_all(names: Sequence[str], writing: int) -> None:
    """In the child: a line of JSON for every module. Does not return."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what libraries print on import is not part of the report
    os.dup2(nothing, 2)
    for name in names:
        version, reason = "", ""
        try:
            version = str(getattr(importlib.import_module(name), "__version__", ""))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what a run would meet
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        os.write(writing, (json.dumps([name, version, reason]) + "\n").encode())
    os.close(writing)
    while True:  # until the parent ends it: an exit would run what libraries have registered for it
        signal.pause()


def _read(reading: int, patience: float, working: Callable[[], None]) -> tuple[str, bool]:
    """Output until the other end is closed or has been silent for `patience` seconds; and whether it was silent."""
    since, text = time.monotonic(), b""
    while time.monotonic() - since < patience:
        if not select.select([reading], [], [], min(1.0, patience))[0]:
            working()
            continue
        if not (piece := os.read(reading, 65536)):
            return text.decode(), False
        since, text = time.monotonic(), text + piece
    return text.decode(), True


def ours() -> str:
    """Version of this package and a fingerprint of its files, since two checkouts may bear the same version."""
    try:
        version = importlib.metadata.version("mmpeft_ds")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "not installed"
    digest = hashlib.sha256()
    folder = os.path.dirname(mmpeft_ds.__file__)
    files = [os.path.join(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".py")]
    for path in sorted([*files, *map(str, (REPOSITORY / "ds_configs").glob("*.json"))]):
        digest.update(os.path.relpath(path, folder).encode())
        with open(path, "rb") as file:
            digest.update(file.read())
    return f"{version} ({digest.hexdigest()[:8]})"


def python() -> str:
    """Version of the interpreter."""
    return ".".join(map(str, sys.version_info[:3]))
