"""Standard output and error that outlive whoever reads them: a closed terminal or pipe does not end the work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

GONE = {errno.EPIPE, errno.EIO}  # of a pipe whose reader has ended, such as `tee` at Ctrl-C; of a closed terminal


class _Outliving(io.TextIOWrapper):
    """A text stream whose descriptor leads nowhere once nobody can read what is written."""

    def write(self, text: str) -> int:
        try:
            written = super().write(text)
        except OSError as error:
            self._leave(error)
            return len(text)
        if self.write_through:  # `python -u`, with which launchers start ranks; the buffer below would hold the text
            self.flush()
        return written

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._leave(error)
            super().flush()

    def _leave(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """Let this process go on when what it prints cannot be read any more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # closed, or somebody takes what is printed
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            buffer = io.BufferedWriter(io.FileIO(stream.fileno(), "wb", closefd=False))
            new = _Outliving(
                buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )  # fmt: skip
            setattr(sys, name, new)
            setattr(sys, f"__{name}__", new)
