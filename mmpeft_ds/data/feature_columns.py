"""Columns of a feature shard: the positions of the features of all its samples, and rows of them by index.

A tar holds arrays byte by byte, at known positions. So the file is mapped into memory, its headers are checked with
array arithmetic, and batches are gathered from it without parsing any sample again. The tar remains the only source.
"""

# n samples of a shard, S slots, D width

from __future__ import annotations

import io
import os
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from mmpeft_ds.data.manifest import local_path, sample_keys
from mmpeft_ds.data.shards import BLOCK, HINT, ShardReader
from mmpeft_ds.errors import BadInput

MEMBERS = 8  # files per sample; samples with more are read one by one
EXTENSIONS = ("json", "npy", "text.npy", "jpg")
_NPY_HEADER = 128  # bytes before the numbers, in files that numpy writes for any plain shape
_DTYPES = (np.dtype("<f2"), np.dtype("<f4"))
_OCTAL = 8 ** np.arange(10, -1, -1, dtype=np.int64)


@dataclass(frozen=True)
class Member:
    """One kind of member of all samples: position of its bytes in the file (-1 if it is missing), and their number."""

    at: np.ndarray
    size: np.ndarray


def _mapped(path: str) -> np.ndarray:
    """The bytes of a file, read where they are used.

    Not by numpy, whose maps keep a descriptor each: a thousand shards would reach the usual limit of a process.
    """
    with open(path, "rb") as file:  # whose error has a kind, unlike torch's
        size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise ValueError("empty")
    data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8).numpy()
    data.flags.writeable = False
    return data


class ShardColumns:
    """The features of one shard.

    Args:
        path: of the tar.
        offsets: (n, 2) int64, see `Manifest.offsets`.
        keys: of the n samples.

    Attributes:
        good: (n,) bool: whether a sample is as launchers/features.py writes it, with one image's features of the shape
            that most samples have.
        rows, width, dtype: of those features: (1 + V, D).
        image_at: (n,) int64, the byte of the file with which the features of each begin.
        read_bytes: (n,) int64, of the record of each and the features of its captions.
        start: address of the file's first byte in this process.
        memory: the bytes of the file, for slices: those of an array take four times as long.
        json: the record of each sample.
        has_texts: whether any sample has features of captions.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is empty.
    """

    def __init__(self, path: str, offsets: np.ndarray, keys: list[str]):
        self.bytes = _mapped(path)
        self.memory = self.bytes.data
        self.start = self.bytes.__array_interface__["data"][0]
        offsets = np.asarray(offsets)
        by_extension, good = _members(self.bytes, offsets, keys)
        self.json = by_extension["json"]
        good &= self.json.at >= 0
        image, text = by_extension["npy"], by_extension["text.npy"]
        self.read_bytes = self.json.size + text.size
        self._shapes: dict[int, tuple[np.dtype, tuple[int, ...]]] = {}
        kinds = self._kinds(image)
        usable = [k for k, (_, shape) in self._shapes.items() if len(shape) == 2 and min(shape) > 0]
        of_kind = {k: int((kinds[good] == k).sum()) for k in usable}
        kind = max(of_kind, key=of_kind.get, default=-1)
        kind = kind if of_kind.get(kind) else -1  # a header may claim more than its file holds
        self.good = good & (kinds == kind) & (kind >= 0)
        self.dtype, (self.rows, self.width) = self._shapes.get(kind, (_DTYPES[1], (0, 0)))
        self.image_at = image.at + _NPY_HEADER
        self._text_at, self._text_kind = text.at + _NPY_HEADER, self._kinds(text)
        bad_text = (text.at >= 0) & ~np.isin(
            self._text_kind, [k for k, (_, shape) in self._shapes.items() if len(shape) == 2]
        )
        self.good &= ~bad_text
        self.has_texts = bool((self._text_kind >= 0).any())

    @property
    def kind(self) -> tuple[np.dtype, int, int]:
        """What the features of shards must share, so that one batch holds them."""
        return self.dtype, self.rows, self.width

    def text(self, sample: int) -> np.ndarray | None:
        """(m, Dt) features of the captions of a good sample, a view into the file; None without captions."""
        kind = int(self._text_kind[sample])
        if kind < 0:
            return None
        dtype, shape = self._shapes[kind]
        at = int(self._text_at[sample])
        return self.bytes[at : at + dtype.itemsize * shape[0] * shape[1]].view(dtype).reshape(shape)

    def _kinds(self, member: Member) -> np.ndarray:
        """(n,) key in `_shapes` of each array; -1 if it is missing or not as we write it."""
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
    """The columns of the shards of a split, opened on first use.

    Args:
        reader: of the split; its files are local, or copied into its cache directory.

    Attributes:
        firsts: for each shard the number of its first sample in the split, and at the end that of all samples.
        good: as that of `ShardColumns`, of all samples of the split; nothing is good in shards not open.
        read_bytes: (n,) int64, of the record of each sample and the features of its captions.
        json: (n, 2) int64, first byte of each record in its file and the one behind its last.
        address: (n,) int64, where in this process the image features of each sample begin.
    """

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self.firsts = np.cumsum([0, *(shard.samples for shard in reader.shards)])
        self._start()

    def __getstate__(self) -> dict:
        return {"reader": self.reader, "firsts": self.firsts}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._open: dict[int, ShardColumns] = {}
        self._windows: dict[int, tuple[int, np.ndarray]] = {}
        n = self.firsts[-1]
        self.good, self.address, self.read_bytes = np.zeros(n, bool), np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.json = np.zeros((n, 2), np.int64)
        # Of each shard the addresses of its first byte and behind its last one; equal where it is not open.
        self._begins, self._ends = np.zeros((2, len(self.firsts) - 1), np.int64)

    def shards(self, numbers: Collection[int]) -> dict[int, ShardColumns]:
        """Some shards. Raises BadInput if one is missing, or has changed."""
        self.reader.check_files(numbers)  # each time: a mapped file that was cut ends the process
        for number in numbers:
            if number not in self._open:
                self._add(number)
        return {number: self._open[number] for number in numbers}

    def _add(self, number: int) -> None:
        manifest, split, info = self.reader.manifest, self.reader.split, self.reader.shards[number]
        path, first = self.reader.path(number), int(self.firsts[number])
        keys = sample_keys(split, range(first, first + info.samples))
        try:
            columns = ShardColumns(path, manifest.offsets(split, number), keys)
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and os.path.exists(path):
                raise BadInput(f"{path}: shard is empty. {HINT}") from error
            raise BadInput(f"{path}: shard cannot be opened ({error}). {HINT}") from error
        own = slice(first, first + info.samples)
        self.good[own], self.address[own] = columns.good, columns.start + columns.image_at
        self.read_bytes[own] = columns.read_bytes
        self.json[own] = np.stack([columns.json.at, columns.json.at + columns.json.size], 1)
        self._begins[number], self._ends[number] = columns.start, columns.start + len(columns.bytes)
        self._open[number] = columns
        self._windows.clear()

    def rows(self, shards: np.ndarray, addresses: np.ndarray, dtype: np.dtype, width: int) -> np.ndarray:
        """(S, D) copies of the rows that begin at some addresses in open shards.

        Raises:
            BadInput: if one does not lie in the file of its shard, from which nothing else would keep the look-up.
        """
        size = dtype.itemsize * width
        outside = (addresses < self._begins[shards]) | (addresses > self._ends[shards] - size)
        if outside.any():
            path = self.reader.path(int(shards[outside.argmax()]))
            raise BadInput(f"{path}: features of a sample would lie outside of the file. {HINT}")
        start, window = self._window(size)
        return window[addresses - start].view(dtype).reshape(-1, width)

    def records(self, shards: np.ndarray, numbers: np.ndarray) -> list[memoryview]:
        """The json of good samples, by their numbers in the split."""
        places = zip(shards.tolist(), self.json[numbers].tolist(), strict=True)
        return [self._open[shard].memory[begin:end] for shard, (begin, end) in places]

    def texts(self, shards: np.ndarray, numbers: np.ndarray) -> list[np.ndarray | None]:
        """`ShardColumns.text` of good samples, by their numbers in the split; empty where no shard has any."""
        if not any(self._open[shard].has_texts for shard in set(shards.tolist())):
            return []
        places = zip(shards.tolist(), (numbers - self.firsts[shards]).tolist(), strict=True)
        return [self._open[shard].text(sample) for shard, sample in places]

    def _window(self, size: int) -> tuple[int, np.ndarray]:
        """An address, and a view of all that lies behind it: element i is the `size` bytes from byte i on.

        It spans all mapped files and what lies between them, of which nobody asks for anything, so that one look-up
        gathers rows from any number of shards.
        """
        if size not in self._windows:
            lowest = min(self._open.values(), key=lambda columns: columns.start)
            end = max(columns.start + len(columns.bytes) for columns in self._open.values())
            shape = (end - lowest.start - size + 1, size)
            view = np.lib.stride_tricks.as_strided(lowest.bytes, shape, (1, 1), writeable=False)
            self._windows[size] = lowest.start, view.view(f"V{size}")[:, 0]
        return self._windows[size]

    def close(self) -> None:
        """Close the files."""
        self._start()


def reachable(reader: ShardReader) -> bool:
    """Whether the shards of a split are local files, or copied to such, which can be mapped into memory."""
    return bool(reader.cache_dir) or local_path(reader.manifest.dir) is not None


def _members(data: np.ndarray, offsets: np.ndarray, keys: list[str]) -> tuple[dict[str, Member], np.ndarray]:
    """Members of all samples by extension, and whether each sample holds plain members of the right key alone."""
    n = len(offsets)
    by_extension = {e: Member(np.full(n, -1), np.zeros(n, np.int64)) for e in EXTENSIONS}
    at, end = offsets[:, 0].astype(np.int64), offsets.sum(1)
    stem = _stems(keys)
    good = (at >= 0) & (end <= len(data))
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
            is_it &= by_extension[extension].at[live] < 0
            by_extension[extension].at[live[is_it]] = at[live[is_it]] + BLOCK
            by_extension[extension].size[live[is_it]] = size[is_it]
            known |= is_it
        good[live] &= plain & known
        at[live] += BLOCK + -(-size // BLOCK) * BLOCK
    return by_extension, good & (at == end)


def _stems(keys: list[str]) -> np.ndarray:
    """(n, L) bytes with which the names of each sample's members begin; where lengths differ, with zeros behind."""
    text = "".join([f"{key}." for key in keys])
    if len(set(map(len, keys))) == 1 and text.isascii():
        return np.frombuffer(text.encode(), np.uint8).reshape(len(keys), -1)
    stems = np.array([f"{key}.".encode() for key in keys])
    return stems.view(np.uint8).reshape(len(keys), -1)


def _checked_sizes(headers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes in (n, 512) tar headers, and whether each header is a plain ustar one with the right checksum."""
    digits = headers[:, 124:135].astype(np.int64) - ord("0")
    claimed = headers[:, 148:154].astype(np.int64) - ord("0")
    plain = ((digits >= 0) & (digits < 8)).all(1) & ((claimed >= 0) & (claimed < 8)).all(1)
    total = headers.sum(1, dtype=np.int64) - headers[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    plain &= claimed @ _OCTAL[-6:] == total
    plain &= np.isin(headers[:, 156], (0, ord("0"))) & (headers[:, 345] == 0)
    return np.where(plain, digits @ _OCTAL, 0), plain


def _described(header: bytes) -> tuple[np.dtype, tuple[int, ...]] | None:
    """dtype and shape of the plain C-ordered array of ours that follows such a header; None for any other."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, EOFError):
        return None
    return (dtype, shape) if dtype in _DTYPES and not fortran and stream.tell() == _NPY_HEADER else None


def _gather(data: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    """(n, size) bytes from the positions `at`; rows that reach beyond the end are zeros."""
    inside = at + size <= len(data)
    gathered = np.zeros((len(at), size), np.uint8)
    if inside.any():
        gathered[inside] = np.lib.stride_tricks.sliding_window_view(data, size)[at[inside]]
    return gathered
