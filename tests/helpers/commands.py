"""Scripts of the project run inside the process of the test."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest


def path_to_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module search path whose first entry a script may replace, as it does with its own folder when it is run."""
    monkeypatch.setattr(sys, "path", ["replaced by the script", *sys.path])  # under test


def load_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The globals of a script, which does nothing yet."""
    path_to_replace(monkeypatch)
    return runpy.run_path(str(path))


def run_script(path: Path, args: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """The exit code of a script with these arguments; None where it does not exit by itself with a code."""
    path_to_replace(monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(path), *args])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    return left.value.code
