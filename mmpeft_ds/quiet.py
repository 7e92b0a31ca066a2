"""Lines that libraries print on every command although nothing is wrong, hidden by name; everything else is shown."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, TextIO


def quiet() -> None:
    """Hide the lines that say nothing; before any library is imported, and without importing one."""
    _hide_warnings()
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # called inside DeepSpeed
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", rf"`torch\.distributed\.{name}` is deprecated", category)
    logging.getLogger("DeepSpeed").addFilter(_says_something)
    # Where a rank is gone, torch warns with a page of C++ frames; the lost rank is reported in one line instead.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.stderr.isatty():  # a bar in a file is a line per refresh
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Inside, hide the warnings that `quiet` hides in a command; for code that others call as well."""
    with warnings.catch_warnings():
        _hide_warnings()
        yield


def _hide_warnings() -> None:
    # peft asks transformers by a name that transformers has since deprecated
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # Said of every layer over int8 weights; launchers/merge.py merges into the dequantised ones.
    warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated without", category=UserWarning)


def _says_something(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Setting accelerator to CPU")


@contextlib.contextmanager
def without_lines(*fragments: str) -> Iterator[None]:
    """Leave out the lines of stdout that hold one of `fragments`; others appear as they are printed."""
    stream = _Filter(sys.stdout, fragments)
    try:
        with contextlib.redirect_stdout(stream):
            yield
    finally:
        stream.stream.write(stream.line)


class _Filter:
    """A text stream that hands whole lines on."""

    def __init__(self, stream: TextIO, fragments: tuple[str, ...]):
        self.stream, self.fragments, self.line = stream, fragments, ""

    def write(self, text: str) -> int:
        self.line += text
        *lines, self.line = self.line.split("\n")
        for line in lines:
            if not any(fragment in line for fragment in self.fragments):
                self.stream.write(line + "\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
