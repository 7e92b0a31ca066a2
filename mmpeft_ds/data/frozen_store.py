"""Store of what frozen towers give for the images of a sample, one record a sample, shared by processes and runs.

    DIR/KEY/key.json            what KEY is a hash of: weights, transform, choice of feature, dtype
    DIR/KEY/SHARD.index         for each sample of a data shard (file, offset, bytes, checksum), zeros while there is
                                no record; SHARD is the beginning of the data shard's sha256
    DIR/KEY/values-N.bin        records, one after the other; one writer each

A record is written before its entry, and its checksum also covers whose record it is and where it lies. So a record
that is half written, damaged, or of another key is noticed, taken for missing, and computed again. Nobody locks
anything: a writer has files of its own, and two that compute the same sample write the same values twice. All
processes must see the same file system; those of one machine see records at once.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import cannot_write, write_json, writing

log = logging.getLogger(__name__)

DESCRIPTION = "key.json"
ENTRY = 4  # uint64 numbers per entry: file, offset, bytes, checksum
ALIGNED = 64  # bytes; records begin at multiples of it
FILE_BYTES = 1 << 30  # from which on a writer begins another file
OPEN = 64  # files that a process keeps open to read; a data set may have thousands of shards, and a limit of 1,024
MEASURED = 1 << 28  # bytes that a writer adds before it measures the directory again
_DIGITS = 15  # hexadecimal, of a shard's hash: 60 bits, which an int64 holds

Value = dict[str, Tensor]  # of one image, by names of forward arguments


@dataclass(frozen=True)
class StoreSpec:
    """Settings with which a process opens a store; they are sent to loader workers.

    Attributes:
        path: directory of the key; empty: there is no store, and every value is computed.
        key: hash of all that values depend on beside the sample.
        limit: bytes of the directory above `path` from which on nothing is written, 0 = none.
    """

    path: str = ""
    key: str = ""
    limit: int = 0


@dataclass(frozen=True)
class Place:
    """Identity of a sample by its content, from the manifest.

    Attributes:
        shard: the first 60 bits of the data shard's sha256.
        samples: of that shard.
        sample: number in it.
    """

    shard: int
    samples: int
    sample: int


def shard_number(sha256: str) -> int:
    """`Place.shard` of a data shard."""
    return int(sha256[:_DIGITS], 16)


@dataclass(frozen=True)
class StoredImage:
    """Stands among the images of a sample for one whose value is stored, or, in a dummy, for one that has none.

    Attributes:
        spelling: text that stands for it in that of a language model, as `Spelled` has it; empty: none.
    """

    spelling: str = ""


class FrozenStore:
    """Reads and writes records. Raises BadInput if what is there belongs to another key or cannot be made."""

    def __init__(self, spec: StoreSpec):
        self.spec, self.path = spec, Path(spec.path)
        self._readers: dict[Path, int] = {}  # file -> descriptor, the one that was used last at the end
        self._writer: tuple[int, int, int] | None = None  # descriptor, number, offset
        self._room = -1  # bytes to add before the directory is measured again
        self.full = ""  # why nothing is written any more

    def prepare(self, description: dict[str, Any]) -> None:
        """Make the directory of the key, or check that the one that is there is of this key. Raises BadInput."""
        file = self.path / DESCRIPTION
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                write_json(file, description)
        try:
            stored = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(f"{file}: cannot be read ({error}). Remove {self.path}; it is computed again.") from error
        if stored != json.loads(json.dumps(description, default=str)):
            raise BadInput(
                f"{file}: describes values of other weights or of another transform than its directory is named for. "
                f"Remove {self.path}; it is computed again."
            )

    # reading

    def find(self, place: Place) -> list[str] | None:
        """Spellings of the images of a sample (empty texts where there are none), None if there is no whole record."""
        record = self._record(place)
        return None if record is None else _head(record)[0]["spellings"]

    def read(self, place: Place) -> list[Value] | None:
        """Values of the images of a sample, in order; None if there is no whole record."""
        record = self._record(place)
        if record is None:
            return None
        head, begin = _head(record)
        values = []
        for image in head["images"]:
            value = {}
            for name, (dtype, shape) in image.items():
                kind = getattr(torch, dtype)
                count = int(np.prod(shape, dtype=np.int64))
                value[name] = torch.frombuffer(record, dtype=kind, count=count, offset=begin).view(shape)
                begin += -(-count * kind.itemsize // ALIGNED) * ALIGNED
            values.append(value)
        return values

    def _record(self, place: Place) -> bytearray | None:
        for _ in range(2):  # an entry that another process is writing may be read half
            entry = self._bytes(self._index_path(place.shard), place.sample * ENTRY * 8, ENTRY * 8)
            file, offset, size, check = map(int, np.frombuffer(entry or bytes(ENTRY * 8), np.uint64))
            if not file:
                return None
            record = self._bytes(self._values_path(file), offset, size)
            if record is not None and self._checksum(place, file, offset, record) == check:
                return record
        log.warning("frozen cache %s: record of sample %d of shard %015x is damaged; it is computed again",
                    self.path, place.sample, place.shard)  # fmt: skip
        return None

    def _index_path(self, shard: int) -> Path:
        return self.path / f"{shard:0{_DIGITS}x}.index"

    def _values_path(self, file: int) -> Path:
        return self.path / f"values-{file:06d}.bin"

    def _bytes(self, path: Path, offset: int, size: int) -> bytearray | None:
        """These bytes of a file; None if it does not have them, as one that is being made."""
        if size > MOST_BYTES or offset > 2**62:
            return None
        try:
            descriptor = self._readers.pop(path, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._readers[path] = descriptor
            if len(self._readers) > OPEN:
                os.close(self._readers.pop(next(iter(self._readers))))
            read = bytearray(size)
            return read if os.preadv(descriptor, [read], offset) == size else None
        except OSError:
            return None

    def _checksum(self, place: Place, file: int, offset: int, record: bytes | bytearray) -> int:
        identity = f"{self.spec.key} {place.shard} {place.sample} {file} {offset} {len(record)}"
        return xxhash.xxh3_64_intdigest(record, seed=xxhash.xxh3_64_intdigest(identity.encode()))

    # writing

    def write(self, place: Place, values: Sequence[Value], spellings: Sequence[str]) -> None:
        """Add the record of a sample. Where that fails, as on a full disk, `full` says why, and nothing more is
        written: reading continues."""
        if self.full:
            return
        record = _record_of(values, spellings)
        try:
            if not self._has_room(len(record)):
                return
            descriptor, file, offset = self._writing(len(record))
            _write_all(descriptor, record, offset)
            self._writer = descriptor, file, offset + len(record)
            check = self._checksum(place, file, offset, record)
            self._enter(place, np.array([file, offset, len(record), check], np.uint64).tobytes())
        except OSError as error:
            self.full = f"{error.filename or self.path}: {cannot_write(error) or error}"

    def _has_room(self, size: int) -> bool:
        limit = self.spec.limit
        if limit and self._room < size:
            used = size_of(self.path.parent)
            if used + size > limit:
                self.full = f"{self.path.parent} holds {used / 2**30:.2f} GiB, see engine.cache_frozen.limit"
                return False
            self._room = min(MEASURED, limit - used)
        self._room -= size
        return True

    def _writing(self, size: int) -> tuple[int, int, int]:
        """Descriptor, number and end of the file that this process writes."""
        if self._writer is None or self._writer[2] + size > FILE_BYTES > size:
            if self._writer is not None:
                os.close(self._writer[0])
                self._writer = None
            numbers = [int(p.stem.removeprefix("values-")) for p in self.path.glob("values-*.bin")]
            number = max(numbers, default=0) + 1
            while True:
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    self._writer = os.open(self._values_path(number), flags, 0o666), number, 0
                    break
                except FileExistsError:
                    number += 1
        return self._writer

    def _enter(self, place: Place, entry: bytes) -> None:
        descriptor = os.open(self._index_path(place.shard), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if os.fstat(descriptor).st_size != place.samples * ENTRY * 8:
                os.ftruncate(descriptor, place.samples * ENTRY * 8)
            _write_all(descriptor, entry, place.sample * ENTRY * 8)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close all files."""
        for descriptor in (*self._readers.values(), *(self._writer or ())[:1]):
            os.close(descriptor)
        self._readers, self._writer = {}, None


MOST_BYTES = 2**40  # of a record; an entry that says more is damaged


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, 0 if there is none."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def room_at(directory: Path) -> int:
    """Bytes that are free where a directory is, or will be made."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def record_bytes(values: Sequence[Value]) -> int:
    """Bytes of a record of these values, which may lie on the meta device, with its entry."""
    body = sum(-(-t.numel() * t.element_size() // ALIGNED) * ALIGNED for value in values for t in value.values())
    return len(_head_bytes(values, [""] * len(values))) + body + ENTRY * 8


def _record_of(values: Sequence[Value], spellings: Sequence[str]) -> bytes:
    parts = [_head_bytes(values, spellings)]
    for value in values:
        for tensor in value.values():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts += [data, bytes(-len(data) % ALIGNED)]
    return b"".join(parts)


def _head_bytes(values: Sequence[Value], spellings: Sequence[str]) -> bytes:
    images = [{n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in value.items()} for value in values]
    text = json.dumps({"images": images, "spellings": list(spellings)}).encode()
    head = len(text).to_bytes(4, "little") + text
    return head + bytes(-len(head) % ALIGNED)


def _head(record: bytearray) -> tuple[dict[str, Any], int]:
    """The description at the beginning of a record, and where its first tensor begins."""
    length = int.from_bytes(record[:4], "little")
    return json.loads(bytes(record[4 : 4 + length])), -(-(4 + length) // ALIGNED) * ALIGNED


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
