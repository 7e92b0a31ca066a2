"""Credentials in URLs, and where files lie: neither leaves this machine by what is printed, recorded or exported."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmpeft_ds.files import write_atomic

MASK = "***"
BASES = "MMPEFT_DS_BASES"  # environment variable: folders in which base models of adapters are looked for
_HERE, _NAMED = "{adapter}/", "{base}/"
_USER = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:token|key|secret|sig|signature|password|passwd|credential|auth)[\w.-]*=)[^&\s'\"#;]+", re.I
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")


def masked(text: str) -> str:
    """`text` without the user names, passwords, tokens and signatures of URLs in it."""
    return _TOKEN.sub(MASK, _QUERY.sub(rf"\1{MASK}", _USER.sub(f"{MASK}@", text)))


def masked_values(value: Any) -> Any:
    """A JSON-able value, of which every text is `masked`."""
    return _mapped(value, masked)


def mask_output() -> None:
    """Mask the log records and the tracebacks of this process."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        if "://" in (text := made.getMessage()):
            made.msg, made.args = masked(text), ()
        return made

    logging.setLogRecordFactory(record)
    sys.excepthook = lambda *error: print(masked("".join(traceback.format_exception(*error))), end="", file=sys.stderr)


def portable(value: Any, directory: Path) -> Any:
    """A JSON-able value for a file in `directory`, with no absolute path in it and `masked`.

    A path below a common folder becomes one from `directory` on, any other a bare name, both with a hash of the whole;
    `found` leads back.
    """

    def moved(text: str) -> str:
        path = text.removeprefix("file://")
        if not os.path.isabs(path):
            return masked(text)
        here, digest = os.path.abspath(directory), hashlib.sha256(os.path.normpath(path).encode()).hexdigest()[:12]
        with contextlib.suppress(OSError):  # of a home that cannot be written, where copies are not found later
            _memory().mkdir(parents=True, exist_ok=True)
            write_atomic(_memory() / digest, os.path.normpath(path))
        if os.path.commonpath([path, here]) == os.sep:
            return f"{_NAMED}{Path(path).name}#{digest}"
        return f"{_HERE}{os.path.relpath(path, here)}#{digest}"

    return _mapped(value, moved)


def named(value: Any) -> Any:
    """A JSON-able value, `masked`, with only the last part of every absolute path: for paths that are not opened."""
    return _mapped(value, lambda text: Path(text).name if os.path.isabs(text) else masked(text))


def found(value: Any, directory: Path) -> Any:
    """A value that `portable` has shortened, with paths that can be opened.

    Looked for, in turn: from `directory` on; in the folders of the environment variable BASES; where it was when this
    user exported the adapter; where the recipe of the run around `directory` says. What is nowhere stays where it
    would be from `directory` on.
    """
    elsewhere = [Path(root) for root in os.environ.get(BASES, "").split(os.pathsep) if root]

    def place(text: str) -> str:
        if not text.startswith((_HERE, _NAMED)):
            return text
        marker, _, rest = text.partition("/")
        rest, _, digest = rest.rpartition("#")
        direct = Path(os.path.normpath(os.path.join(os.path.abspath(directory), rest)))
        if marker + "/" == _HERE and direct.exists():
            return str(direct)
        named = [root / direct.name for root in elsewhere] + _remembered(digest) + _of_run(directory, direct.name)
        return str(next((path for path in named if path.exists()), direct))

    return _mapped(value, place)


def _memory() -> Path:
    """Folder with a file for each place that this user has exported an adapter from, called by the place's hash."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpeft_ds" / "places"


def _remembered(digest: str) -> list[Path]:
    try:
        return [Path((_memory() / digest).read_text("utf-8"))] if digest.isalnum() else []
    except (OSError, ValueError):
        return []


def _of_run(directory: Path, name: str) -> list[Path]:
    """Paths of that last part in the recipe of the run that an adapter directory lies in."""
    import yaml

    paths: list[Path] = []
    try:
        recipe = yaml.safe_load((directory.absolute().parent / "recipe.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return paths
    _mapped(recipe, lambda text: paths.append(Path(text)) if os.path.isabs(text) and Path(text).name == name else None)
    return paths


def _mapped(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(inner, change) for inner in value]
    return value
