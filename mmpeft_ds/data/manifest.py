"""The manifest of a prepared data set, manifest.json, which is read before any shard.

A data set directory holds `NAME-SPLIT-000000.tar ...`, one `NAME-SPLIT.index.npy` per split (position and length of
every sample) and `manifest.json`, which is written last: a directory without it is not finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import check_regular, write_atomic
from mmpeft_ds.tower_keys import same_key

SCHEMA = 1
FILE = "manifest.json"
NAME = re.compile(r"[a-z0-9_-]+")
_SHA256 = re.compile("[0-9a-f]{64}")
MOST = 2**50  # samples or bytes of one shard: sums over many shards stay within 64 bits
_PLAIN_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file.

    Attributes:
        file: name in the directory of the manifest.
        samples: number of samples.
        bytes: size of the file.
        sha256: of the whole file, 64 hexadecimal digits.
    """

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class IndexInfo:
    """The side file of one split: an int64 array (samples of the split, 2), see `Manifest.offsets`."""

    file: str
    sha256: str


@dataclass
class Manifest:
    """A prepared data set.

    Attributes:
        name: data set name, `[a-z0-9_-]+`; sample ids are `name/key`.
        licence: SPDX name or a short statement.
        source: `name` of the file in data_prep/sources, its `options`, and `fingerprint` of the data that the shards
            were made from: file or package name -> version or sha256; `resize` where pictures were stored smaller, see
            `data_prep.common.resize.described`.
        samples_per_shard: of every shard but the last of a split.
        splits: split -> its shards, in order.
        index: split -> its side file.
        fields: split -> field path (`questions[].answers`) -> {type, present, min, mean, max}; the last three are
            lengths of text and lists or values of numbers; `images` counts the images of a sample, `features` the
            numbers of its array. See `data.identity` for `distinct` of `images` and `shared` of `captions[]`.
        labels: closed list of answers or classes in the order of their class index, or None.
        label_counts: how often each label occurs in the training split, or None.
        statistics: features' key -> {mean, std, count, split, ...}, added by data_prep/feature_stats.py.
        towers: of feature shards, which frozen towers made them, see `data.feature_shards`; empty for other data sets.
        features_are: of stored arrays with several rows for one image, what the rows are: `grid`, the places of a
            square grid in row order, or `regions`, such as those of a detector; empty: not said, as in all manifests
            of before.
        account: split -> what became of the source's records, see `data_prep.sources.base.Source.account`; empty for
            sources that set none aside.
        dir: directory that it was loaded from, a local path or a URL that fsspec opens; not stored.
        schema: version of this format.
    """

    name: str
    licence: str
    source: dict[str, Any]
    samples_per_shard: int
    splits: dict[str, list[ShardInfo]]
    index: dict[str, IndexInfo]
    fields: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    labels: list[str] | None = None
    label_counts: list[int] | None = None
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)
    towers: dict[str, Any] = field(default_factory=dict)
    features_are: str = ""
    account: dict[str, dict[str, Any]] = field(default_factory=dict)
    dir: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        self._index_cache: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Leave out memory maps, which would be sent to loader processes as full copies.
        return {**self.__dict__, "_index_cache": {}}

    @classmethod
    def load(cls, dir: str | os.PathLike) -> Manifest:
        """Read `dir`/manifest.json.

        Raises:
            BadInput: if there is none, it is damaged, or a newer version of this project wrote it.
        """
        where = str(dir).rstrip("/") or "/"
        text = read_side_file(where, FILE, "prepare the data set first: python data_prep/prepare.py SOURCE --out DIR")
        try:
            raw = json.loads(text)
            schema = raw.pop("schema")
            if schema > SCHEMA:
                raise BadInput(
                    f"{where}/{FILE}: schema {schema} is newer than {SCHEMA}, which this version reads. Update it."
                )
            splits = {s: [ShardInfo(**shard) for shard in shards] for s, shards in raw.pop("splits").items()}
            index = {s: IndexInfo(**info) for s, info in raw.pop("index").items()}
            manifest = cls(splits=splits, index=index, dir=where, schema=schema, **raw)
            manifest._check()
        except BadInput:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise BadInput(f"{where}/{FILE}: damaged ({reason}). Restore it or prepare the data set again.") from error
        return manifest

    def save(self, dir: str | os.PathLike) -> None:
        """Write `dir`/manifest.json; a reader sees the old one or the new one, never a part. Local paths only."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ("dir", "_index_cache")}
        if not self.account:
            del kept["account"]
        content = {"schema": self.schema, **kept}
        content["splits"] = {s: [asdict(shard) for shard in shards] for s, shards in self.splits.items()}
        content["index"] = {s: asdict(info) for s, info in self.index.items()}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomic(Path(dir) / FILE, (text + "\n").encode())

    def shards(self, split: str) -> list[ShardInfo]:
        """Shards of `split` in order. Raises BadInput that lists the known splits if there is no such split."""
        if split not in self.splits:
            raise BadInput(f"{self.dir}/{FILE}: no split {split!r}. Known: {', '.join(self.splits)}.")
        return self.splits[split]

    def samples(self, split: str) -> int:
        """Number of samples of `split`."""
        return sum(shard.samples for shard in self.shards(split))

    def statistics_of(self, key: str) -> dict[str, Any] | None:
        """The statistics of the features with this key, None if they have not been measured."""
        return next((measured for stored, measured in self.statistics.items() if same_key(stored, key)), None)

    def path(self, file: str) -> str:
        """Full path or URL of a shard or side file."""
        return f"{self.dir}/{file}"

    def offsets(self, split: str, shard_index: int) -> np.ndarray:
        """Positions of the samples of one shard.

        Returns:
            int64 array (samples, 2): byte offset of the first tar header of the sample, and the bytes of all its
            members with headers and padding. That range of bytes is a piece of tar that holds exactly this sample.

        Raises:
            BadInput: if the side file is missing, altered or of another length than the manifest says.
        """
        shards = self.shards(split)
        first = sum(shard.samples for shard in shards[:shard_index])
        return self._load_index(split)[first : first + shards[shard_index].samples]

    def _load_index(self, split: str) -> np.ndarray:
        if split in self._index_cache:
            return self._index_cache[split]
        info = self.index[split]
        hint = "restore it or prepare the data set again with --overwrite"
        data = read_side_file(self.dir, info.file, hint)
        digest = hashlib.sha256(data).hexdigest()
        if digest != info.sha256:
            raise BadInput(
                f"{self.path(info.file)}: sha256 {digest[:12]}.., manifest says {info.sha256[:12]}..; {hint}."
            )
        local = local_path(self.path(info.file))
        # Map local files into memory, so that all ranks of a node share their pages.
        expected = (self.samples(split), 2)
        try:
            table = np.load(local or io.BytesIO(data), mmap_mode="r" if local else None, allow_pickle=False)
        except Exception as error:  # noqa: BLE001 - the header is a Python literal, whose parser raises nearly anything
            raise BadInput(f"{self.path(info.file)}: no array ({' '.join(str(error).split())}); {hint}.") from error
        if not isinstance(table, np.ndarray) or table.shape != expected or table.dtype != np.int64:
            actual = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else "several arrays"
            raise BadInput(f"{self.path(info.file)}: {actual}, expected int64 {expected}; {hint}.")
        first = 0
        for shard in self.shards(split):
            begin, length = table[first : first + shard.samples].T
            # in this order, since no sum of two numbers of a file is safe from overflow
            outside = (begin < 0) | (length <= 0) | (length > shard.bytes) | (begin > shard.bytes - length.clip(0))
            if outside.any():
                at = int(outside.argmax())
                raise BadInput(
                    f"{self.path(info.file)}: sample {first + at} at {begin[at]} with {length[at]} bytes lies outside "
                    f"of {shard.file}, which has {shard.bytes}; {hint}."
                )
            first += shard.samples
        self._index_cache[split] = table
        return table

    def _check(self) -> None:
        """Raise ValueError if the contents contradict each other, or name files outside the manifest's directory."""
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}")
        if set(self.splits) != set(self.index):
            raise ValueError("splits and index name different splits")
        for shards in self.splits.values():
            for shard in shards:
                counts = (shard.samples, shard.bytes)
                if not _PLAIN_FILE.fullmatch(shard.file) or not all(type(n) is int and 0 < n < MOST for n in counts):
                    raise ValueError(f"shard {shard}")
                if not _SHA256.fullmatch(shard.sha256):
                    raise ValueError(f"sha256 of {shard.file}")
        for info in self.index.values():
            if not (_PLAIN_FILE.fullmatch(info.file) and _SHA256.fullmatch(info.sha256)):
                raise ValueError(f"index file {info.file!r}")
        if self.labels is not None and len(self.labels) != len(self.label_counts or []):
            raise ValueError("labels and label_counts differ in length")
        if self.towers:
            if not (self.towers["key"] and isinstance(self.towers["image_width"], int)):
                raise ValueError("towers without key or image_width")
            texts = self.towers.get("classes")
            if texts and not (_PLAIN_FILE.fullmatch(texts["file"]) and _SHA256.fullmatch(texts["sha256"])):
                raise ValueError(f"class texts {texts}")


def sample_key(split: str, number: int) -> str:
    """Key of sample `number` of a split: of fixed width, without a dot, at which WebDataset would cut it."""
    return f"{split}-{number:09d}"


def sample_keys(split: str, numbers: Iterable[int], before: str = "") -> list[str]:
    """`sample_key` of many samples, behind `before`."""
    return [f"{before}{split}-{number:09d}" for number in numbers]


def local_path(url: str) -> str | None:
    """The path of a local path or file:// URL, None for anything else."""
    if url.startswith("file://"):
        return url[len("file://") :]
    return None if re.match(r"pipe:|[A-Za-z0-9_+.-]+(://|::)", url) else url


def read_side_file(dir: str, file: str, hint: str) -> bytes:
    """All bytes of a file of a data set. Raises BadInput, which ends with `hint` if there is no such file."""
    url = f"{dir}/{file}"
    try:
        check_regular(local_path(url) or "")
        with fsspec.open(url, "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadInput(f"{url}: not found; {hint}.") from error
    except (OSError, ValueError, ImportError) as error:
        # ValueError: unknown protocol; ImportError: its package is not installed
        raise BadInput(f"{url}: cannot be read ({' '.join(str(error).split())}).") from error
