"""Writing of tars whose bytes depend on their members alone, with their hash and positions on the way."""

from __future__ import annotations

import hashlib
import os
import tarfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

CHUNK = 1 << 20  # bytes collected before they are hashed and written
_BLOCK = tarfile.BLOCKSIZE


class TarWriter:
    """Writes samples to an open file: regular members with a fixed time, user and mode.

    The bytes are those of `webdataset.ShardWriter(mtime=0)`, whose import would bring torch into every worker, and of
    tarfile, which takes several times as long to write and must read a file again to tell the positions. A thread
    hashes and writes one chunk while the next one is collected. Use it in a `with` statement.

    Args:
        stream: a new file, open for writing in binary mode without a buffer.
    """

    def __init__(self, stream: IO[bytes]):
        self._stream = stream
        self._digest = hashlib.sha256()
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._at = 0
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """Add the files of one sample, `KEY.EXTENSION`, in the order of their extensions."""
        self._begins.append(self._at)
        for extension in sorted(parts):
            data = parts[extension]
            self._put(header(f"{key}.{extension}", len(data)))
            self._put(data)
            if rest := -len(data) % _BLOCK:
                self._put(bytes(rest))
        self._ends.append(self._at)

    def close(self) -> tuple[int, str, np.ndarray]:
        """Write the end of the tar and wait until all is on disk.

        Returns:
            the size of the file in bytes, its sha256, and (begin, length) of every sample, int64 (samples, 2).
        """
        end = self._at + 2 * _BLOCK
        self._put(bytes(end + -end % tarfile.RECORDSIZE - self._at))
        self._write()
        self._wait()
        os.fsync(self._stream.fileno())
        begins, ends = (np.array(values, dtype=np.int64) for values in (self._begins, self._ends))
        return self._at, self._digest.hexdigest(), np.stack([begins, ends - begins], axis=1)

    def _put(self, data: bytes) -> None:
        self._pieces.append(data)
        self._at += len(data)
        self._waiting += len(data)
        if self._waiting >= CHUNK:
            self._write()

    def _write(self) -> None:
        self._wait()
        self._writing = self._thread.submit(self._hash_and_write, self._pieces)
        self._pieces, self._waiting = [], 0

    def _wait(self) -> None:
        """Until the last chunk is written. Raises OSError if it could not be."""
        if self._writing is not None:
            self._writing.result()

    def _hash_and_write(self, pieces: list[bytes]) -> None:
        data = memoryview(b"".join(pieces))
        self._digest.update(data)
        while data:
            data = data[self._stream.write(data) :]


def header(name: str, size: int) -> bytes:
    """The header of a member, as tarfile writes it in the form of ustar."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        return _info(name, size).tobuf(tarfile.USTAR_FORMAT)
    block = bytearray(_TEMPLATE)
    digits = b"%011o" % size
    block[0 : len(encoded)] = encoded
    block[124:135] = digits
    # The check sum is that of all bytes; of the template, whose size is eleven digits 0, it is known.
    block[148:154] = b"%06o" % (_TEMPLATE_SUM + sum(encoded) + sum(digits) - 11 * 48)
    return bytes(block)


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uname = info.gname = "bigdata"
    return info


_TEMPLATE = _info("", 0).tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = int(_TEMPLATE[148:156].rstrip(b"\0 "), 8)
