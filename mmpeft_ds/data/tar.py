"""Writing of tars whose bytes depend on their members alone, with their hash and positions on the way."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

CHUNK = 1 << 21  # bytes that are hashed and written at a time; a multiple of any disk's blocks
BUFFERS = 3  # one is filled while another is hashed and written, and a third waits for the slower of the two
_BLOCK = tarfile.BLOCKSIZE
_LARGE = 1 << 15  # bytes of a member that is not copied twice
_ZEROS = bytes(_BLOCK)


class TarWriter:
    """Writes samples to an open file: regular members with a fixed time, user and mode.

    The bytes are those of `webdataset.ShardWriter(mtime=0)`, whose import would bring torch into every worker, and of
    tarfile, which takes several times as long to write and must read a file again to tell the positions. One thread
    hashes a chunk and another writes it while the next one is collected. Where the file system can, chunks go to the
    disk without a copy in the system's cache: a shard is on disk before the next one begins in any case, and the
    pictures that are read stay in the cache. Use it in a `with` statement.

    Args:
        stream: a new file, open for writing in binary mode without a buffer.
    """

    def __init__(self, stream: IO[bytes]):
        self._file = stream.fileno()
        self._digest = hashlib.sha256()
        self._buffers = deque(memoryview(mmap.mmap(-1, CHUNK)) for _ in range(BUFFERS))  # aligned, as disks want it
        self._fill = 0
        self._at = 0
        self._begins: list[int] = []
        self._ends: list[int] = []
        self._hasher, self._writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._under_way: deque[tuple[Future[None], Future[None]]] = deque()
        self._uncached = _set_uncached(self._file, True)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        self._writer.shutdown()

    def add(self, key: str, parts: dict[str, bytes]) -> None:
        """Add the files of one sample, `KEY.EXTENSION`, in the order of their extensions."""
        self._begins.append(self._at)
        small: list[bytes] = []  # what is put together: one long copy costs less than many short ones
        for extension in sorted(parts):
            data = parts[extension]
            small.append(header(f"{key}.{extension}", len(data)))
            if len(data) >= _LARGE:
                self._put(b"".join(small))
                self._put(data)
                small = []
            else:
                small.append(data)
            small.append(_ZEROS[: -len(data) % _BLOCK])
        self._put(b"".join(small))
        self._ends.append(self._at)

    def close(self) -> tuple[int, str, np.ndarray]:
        """Write the end of the tar and wait until all is on disk.

        Returns:
            the size of the file in bytes, its sha256, and (begin, length) of every sample, int64 (samples, 2).
        """
        end = self._at + 2 * _BLOCK
        self._put(bytes(end + -end % tarfile.RECORDSIZE - self._at))
        self._send()
        while self._under_way:
            self._wait()
        os.fsync(self._file)
        begins, ends = (np.array(values, dtype=np.int64) for values in (self._begins, self._ends))
        return self._at, self._digest.hexdigest(), np.stack([begins, ends - begins], axis=1)

    def _put(self, data: bytes) -> None:
        self._at += len(data)
        rest: bytes | memoryview = data
        while len(rest) >= (room := CHUNK - self._fill):
            rest = memoryview(rest)
            self._buffers[0][self._fill :] = rest[:room]
            self._fill = CHUNK
            self._send()
            rest = rest[room:]
        self._buffers[0][self._fill : self._fill + len(rest)] = rest
        self._fill += len(rest)

    def _send(self) -> None:
        """Let the first buffer be hashed and written, and take the one that was sent longest ago."""
        chunk = self._buffers[0][: self._fill]
        self._under_way.append(
            (self._hasher.submit(self._digest.update, chunk), self._writer.submit(self._write, chunk))
        )
        self._buffers.rotate(-1)
        self._fill = 0
        if len(self._under_way) == BUFFERS:
            self._wait()

    def _wait(self) -> None:
        """Until the chunk that was sent longest ago is written. Raises OSError if it could not be."""
        for future in self._under_way.popleft():
            future.result()

    def _write(self, chunk: memoryview) -> None:
        if self._uncached and len(chunk) < CHUNK:  # the end of the file, which is no whole block
            self._uncached = _set_uncached(self._file, False)
        while chunk:
            try:
                chunk = chunk[os.write(self._file, chunk) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._uncached:
                    raise
                self._uncached = _set_uncached(self._file, False)  # this file system wants other blocks


def _set_uncached(file: int, on: bool) -> bool:
    """Let writes bypass the system's cache, or not; whether they do, which some systems and file systems refuse."""
    flag = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
    except OSError:
        return False
    return on and flag != 0


def header(name: str, size: int) -> bytes:
    """The header of a member, as tarfile writes it in the form of ustar."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        return _info(name, size).tobuf(tarfile.USTAR_FORMAT)
    digits = b"%011o" % size
    # The check sum is that of all bytes; of the template, whose size is eleven digits 0, it is known.
    checks = b"%06o" % (_TEMPLATE_SUM + sum(encoded) + sum(digits) - 11 * 48)
    return b"".join((encoded, _TEMPLATE[len(encoded) : 124], digits, _TEMPLATE[135:148], checks, _TEMPLATE[154:]))


def _info(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o444, 0
    info.uname = info.gname = "bigdata"
    return info


_TEMPLATE = _info("", 0).tobuf(tarfile.USTAR_FORMAT)
_TEMPLATE_SUM = int(_TEMPLATE[148:156].rstrip(b"\0 "), 8)
