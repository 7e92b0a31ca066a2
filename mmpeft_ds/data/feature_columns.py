"""Where the features of a shard lie, worked out for all of its samples at once; and rows of them by index.

A tar keeps arrays as they are, at known places. So the file is mapped into memory, its headers are checked with array
arithmetic, and a batch is gathered from it without parsing a sample again. The tar stays the only source.
"""

# n samples of a shard, S slots, D width

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import numpy as np

from mmpeft_ds.data.manifest import local_path, sample_key
from mmpeft_ds.data.shards import BLOCK, HINT, ShardReader, cached
from mmpeft_ds.errors import BadInput

MEMBERS = 8  # of a sample; more are left to the slow way
EXTENSIONS = ("json", "npy", "text.npy", "jpg")
_NPY_HEADER = 128  # bytes before the numbers, as numpy writes it for any plain shape
_DTYPES = (np.dtype("<f2"), np.dtype("<f4"))
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)


@dataclass(frozen=True)
class Member:
    """One kind of member of all samples: where its bytes begin in the file, and how many; -1 where it is missing."""

    at: np.ndarray
    size: np.ndarray


class ShardColumns:
    """The features of one shard.

    Args:
        path: of the tar.
        offsets: (n, 2) int64, see `Manifest.offsets`.
        keys: of the n samples.

    Attributes:
        good: (n,) bool: laid out as launchers/features.py writes it: one image's features of the shape most have.
        rows, width, dtype: of those features: (1 + V, D).
        json: where the record of each sample is.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str, offsets: np.ndarray, keys: list[str]):
        self.bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))  # a plain array: slices of memmaps are slow
        offsets = np.asarray(offsets)
        found, good = _members(self.bytes, offsets, keys)
        self.json = found["json"]
        good &= self.json.at >= 0
        image, text = found["npy"], found["text.npy"]
        self._shapes: dict[int, tuple[np.dtype, tuple[int, ...]]] = {}
        kinds = self._kinds(image)
        usable = [k for k, (_, shape) in self._shapes.items() if len(shape) == 2 and min(shape) > 0]
        of_kind = {k: int((kinds[good] == k).sum()) for k in usable}
        kind = max(of_kind, key=of_kind.get, default=-1)
        self.good = good & (kinds == kind) & (kind >= 0)
        self.dtype, (self.rows, self.width) = self._shapes.get(kind, (_DTYPES[1], (0, 0)))
        self._image_at = image.at + _NPY_HEADER
        self._text_at, self._text_kind = text.at + _NPY_HEADER, self._kinds(text)
        bad_text = (text.at >= 0) & ~np.isin(
            self._text_kind, [k for k, (_, shape) in self._shapes.items() if len(shape) == 2]
        )
        self.good &= ~bad_text
        size = self.dtype.itemsize
        numbers = self.bytes[: len(self.bytes) // size * size].view(self.dtype)
        # Row i begins with number i of the file: places of features are picked from these overlapping rows.
        self._rows_from = np.lib.stride_tricks.sliding_window_view(numbers, max(self.width, 1))
        self._image_at //= size

    def images(self, samples: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(S, D): row `rows[i]` of the features of sample `samples[i]`; samples must be good."""
        return self._rows_from[self._image_at[samples] + rows * self.width]

    def text(self, sample: int) -> np.ndarray | None:
        """(m, Dt) features of the captions of a good sample, a view into the file; None without captions."""
        kind = int(self._text_kind[sample])
        if kind < 0:
            return None
        dtype, shape = self._shapes[kind]
        at = int(self._text_at[sample])
        return self.bytes[at : at + dtype.itemsize * shape[0] * shape[1]].view(dtype).reshape(shape)

    def content(self, sample: int) -> bytes:
        """All image features of a good sample, as they are stored."""
        at = int(self._image_at[sample]) * self.dtype.itemsize
        return self.bytes[at : at + self.dtype.itemsize * self.rows * self.width].tobytes()

    def record(self, sample: int) -> bytes:
        """The json of a sample."""
        at, size = int(self.json.at[sample]), int(self.json.size[sample])
        return self.bytes[at : at + size].tobytes()

    def _kinds(self, member: Member) -> np.ndarray:
        """(n,) which of `_shapes` an array has; -1: missing, or none that we write."""
        kinds = np.full(len(member.at), -1)
        there = np.flatnonzero((member.at >= 0) & (member.size >= _NPY_HEADER))
        if not len(there):
            return kinds
        headers = _gather(self.bytes, member.at[there], _NPY_HEADER)
        while len(there):
            described, alike = _described(headers[0].tobytes()), (headers == headers[0]).all(1)
            same, there, headers = there[alike], there[~alike], headers[~alike]
            if described is None:
                continue
            dtype, shape = described
            whole = member.size[same] == _NPY_HEADER + dtype.itemsize * int(np.prod(shape))
            aligned = member.at[same] % dtype.itemsize == 0
            kind = len(self._shapes)
            self._shapes[kind] = described
            kinds[same[whole & aligned]] = kind
        return kinds


class Columns:
    """The columns of the shards of a split, opened when they are first asked for.

    Args:
        reader: of the split; its files are local, or copied into its cache directory.
    """

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self._open: dict[int, ShardColumns] = {}
        self._firsts = np.cumsum([0, *(shard.samples for shard in reader.shards)])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def shard(self, number: int) -> ShardColumns:
        """One shard. Raises BadInput if it is missing."""
        if number not in self._open:
            manifest, split, info = self.reader.manifest, self.reader.split, self.reader.shards[number]
            path = local_path(manifest.path(info.file)) or cached(manifest, split, number, self.reader.cache_dir)
            first = int(self._firsts[number])
            keys = [sample_key(split, first + i) for i in range(info.samples)]
            try:
                self._open[number] = ShardColumns(path, manifest.offsets(split, number), keys)
            except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
                if isinstance(error, ValueError) and os.path.exists(path):
                    raise BadInput(f"{path}: shard is empty. {HINT}") from error
                raise BadInput(f"{path}: shard cannot be opened ({error}). {HINT}") from error
        return self._open[number]

    def key(self, shard: int, sample: int) -> str:
        """Key of a good sample."""
        return sample_key(self.reader.split, int(self._firsts[shard]) + sample)

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()


def reachable(reader: ShardReader) -> bool:
    """Whether the shards of a split are, or come, to local files, which can be mapped."""
    return bool(reader.cache_dir) or local_path(reader.manifest.dir) is not None


def _members(data: np.ndarray, offsets: np.ndarray, keys: list[str]) -> tuple[dict[str, Member], np.ndarray]:
    """Members of all samples by extension, and which samples hold nothing but plain members of the right key."""
    n = len(offsets)
    found = {e: Member(np.full(n, -1), np.zeros(n, np.int64)) for e in EXTENSIONS}
    at, end = offsets[:, 0].astype(np.int64), offsets.sum(1)
    stem = np.array([f"{key}.".encode() for key in keys])
    stem = stem.view(np.uint8).reshape(n, -1)
    good = end <= len(data)
    for _ in range(MEMBERS):
        live = np.flatnonzero(good & (at < end))
        if not len(live):
            break
        headers = _gather(data, at[live], BLOCK)
        size, plain = _checked_sizes(headers)
        plain &= (headers[:, : stem.shape[1]] == stem[live]).all(1)
        plain &= at[live] + BLOCK + size <= end[live]
        known = np.zeros(len(live), bool)
        for extension in EXTENSIONS:
            name = np.frombuffer(extension.encode() + b"\0", np.uint8)
            is_it = (headers[:, stem.shape[1] : stem.shape[1] + len(name)] == name).all(1)
            is_it &= found[extension].at[live] < 0
            found[extension].at[live[is_it]] = at[live[is_it]] + BLOCK
            found[extension].size[live[is_it]] = size[is_it]
            known |= is_it
        good[live] &= plain & known
        at[live] += BLOCK + -(-size // BLOCK) * BLOCK
    return found, good & (at == end)


def _checked_sizes(headers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes that (n, 512) tar headers tell, and which headers are plain ustar ones with the right checksum."""
    digits = headers[:, 124:135].astype(np.int64) - ord("0")
    claimed = headers[:, 148:154].astype(np.int64) - ord("0")
    plain = ((digits >= 0) & (digits < 8)).all(1) & ((claimed >= 0) & (claimed < 8)).all(1)
    total = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    plain &= claimed @ _OCTAL[-6:] == total
    plain &= np.isin(headers[:, 156], (0, ord("0"))) & (headers[:, 345] == 0)
    return np.where(plain, digits @ _OCTAL, 0), plain


def _described(header: bytes) -> tuple[np.dtype, tuple[int, ...]] | None:
    """dtype and shape of a plain C-ordered array of ours behind such a header; None for anything else."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError):
        return None
    return (dtype, shape) if dtype in _DTYPES and not fortran and stream.tell() == _NPY_HEADER else None


def _gather(data: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """(n, size) bytes from the places `at`; those behind the end are zeros."""
    inside = at + size <= len(data)
    found = np.zeros((len(at), size), np.uint8)
    if inside.any():
        found[inside] = np.lib.stride_tricks.sliding_window_view(data, size)[at[inside]]
    return found
