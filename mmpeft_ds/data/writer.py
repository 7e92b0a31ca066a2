"""Writing of shards: plain WebDataset tars whose bytes depend on the samples alone.

Each shard is a job: it is written under a temporary name, renamed, and only then described by a part file. So an
interrupted job leaves nothing that looks finished, and jobs may run in any order, in any process and on any node.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft_ds.data import identity
from mmpeft_ds.data.formats import STORED
from mmpeft_ds.data.manifest import IndexInfo, Manifest, ShardInfo, sample_key
from mmpeft_ds.files import fsync, sha256, write_atomic

PARTS = ".parts"


@dataclass
class RawSample:
    """One sample before it is written.

    Attributes:
        name: the source's own name of it; stored in the json, never used as a key.
        images: (extension without dot, encoded bytes), any number, in order.
        record: json-able fields (texts, answers, labels, ...).
        features: an array instead of, or beside, the images; never of Python objects.
        arrays: further arrays, by the name under which they are stored, `NAME.npy`.
    """

    name: str
    images: list[tuple[str, bytes]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    features: np.ndarray | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Part:
    """The contribution of one finished shard to the manifest.

    Attributes:
        shard: the tar file.
        offsets: (begin, length) in bytes of every sample, as `Manifest.offsets` gives them.
        fields: field path -> `FieldCount` numbers.
        label_counts: answer or class name -> occurrences.
        contents: of every sample, the identity of its pictures and of each caption, see `data.identity`.
    """

    shard: ShardInfo
    offsets: list[tuple[int, int]]
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    label_counts: dict[str, int] = field(default_factory=dict)
    contents: list[tuple[str, list[str]]] = field(default_factory=list)


def shard_file(name: str, split: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{split}-{number:06d}.tar"


def members(sample: Any) -> dict[str, bytes]:
    """Extension -> bytes of a raw sample: `json`; `jpg`, or `0.jpg`, `1.jpg`, ... if several; `npy` for features.

    Args:
        sample: a `RawSample`, or anything else with its attributes.

    Raises:
        ValueError: if an image extension is unknown, the record is no JSON, or features hold Python objects.
    """
    record = {**sample.record, "source_name": sample.name}
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {"json": text.encode()}
    for i, (extension, data) in enumerate(sample.images):
        stored = STORED.get(extension.lower())
        if stored is None:
            raise ValueError(f"{sample.name}: image extension {extension!r} is none of {', '.join(STORED)}")
        parts[stored if len(sample.images) == 1 else f"{i}.{stored}"] = data
    if sample.features is not None:
        parts["npy"] = _npy(sample.features)
    for name, array in sample.arrays.items():
        parts[f"{name}.npy"] = _npy(array)
    return parts


def write_shard(dir: Path, name: str, split: str, number: int, first: int, samples: Iterable[Any]) -> Part:
    """Write shard `number` of a split, whose first sample is the split's sample `first`, and its part file.

    Returns:
        its part; the tar and the part file are in place and on disk.
    """
    file = shard_file(name, split, number)
    temporary = dir / PARTS / f"{file}.{os.getpid()}.tmp"
    counts, labels, contents = FieldCounts(), {}, []
    with open(temporary, "w+b") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for i, sample in enumerate(samples):
                add_sample(archive, sample_key(split, first + i), members(sample))
                counts.add(sample)
                for label in _labels_of(sample.record):
                    labels[label] = labels.get(label, 0) + 1
                contents.append(identity.contents(sample))
        stream.flush()
        os.fsync(stream.fileno())
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        digest = sha256(stream)
    offsets = sample_offsets(temporary)
    if len(offsets) != len(contents):
        raise RuntimeError(f"{file}: wrote {len(contents)} samples but find {len(offsets)} in the tar")
    os.replace(temporary, dir / file)
    fsync(dir)
    part = Part(ShardInfo(file, len(contents), size, digest), offsets, counts.counts, labels, contents)
    write_atomic(part_path(dir, file), json.dumps(asdict(part), ensure_ascii=False).encode())
    return part


def add_sample(archive: tarfile.TarFile, key: str, parts: dict[str, bytes]) -> None:
    """Add the files of a sample to a tar, in order and with a fixed time, user and mode, so that the bytes depend on
    nothing else. They are those of webdataset.ShardWriter, whose import would bring torch into every worker."""
    for extension in sorted(parts):
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode, info.mtime = len(parts[extension]), 0o444, 0
        info.uname = info.gname = "bigdata"
        archive.addfile(info, io.BytesIO(parts[extension]))


def part_path(dir: Path, file: str) -> Path:
    """Path of the part file of the shard `file`, which is kept until the manifest is written."""
    return dir / PARTS / f"{file}.json"


def finished_part(dir: Path, file: str) -> Part | None:
    """The part of a shard that an earlier run has finished, if the tar has not changed since; None otherwise."""
    try:
        raw = json.loads(part_path(dir, file).read_text("utf-8"))
        offsets, contents = ([tuple(item) for item in raw[key]] for key in ("offsets", "contents"))
        part = Part(ShardInfo(**raw["shard"]), offsets, raw["fields"], raw["label_counts"], contents)
        good = (dir / file).stat().st_size == part.shard.bytes and sha256(dir / file) == part.shard.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return part if good else None


def sample_offsets(tar: Path) -> list[tuple[int, int]]:
    """(offset of the first header, bytes of all members and padding) of every sample of a tar, in order."""
    offsets: list[list[int]] = []
    previous = None
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            key = member.name.split(".", 1)[0]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if key == previous:
                offsets[-1][1] = end - offsets[-1][0]
            else:
                offsets.append([member.offset, end - member.offset])
            previous = key
            archive.members = []  # otherwise tarfile keeps every header
    return [tuple(pair) for pair in offsets]


def write_manifest(
    dir: Path,
    name: str,
    licence: str,
    source: dict[str, Any],
    samples_per_shard: int,
    parts: dict[str, list[Part]],
    labels: list[str] | None,
    label_split: str,
    towers: dict[str, Any] | None = None,
    features_are: str = "",
    account: dict[str, dict[str, Any]] | None = None,
) -> Manifest:
    """Write the side files and, last, the manifest of a data set whose shards are all in place.

    Args:
        parts: split -> parts of its shards in order.
        labels: closed label list in the order of the class index, or None.
        label_split: split whose labels are counted.
        towers: of feature shards, see `data.feature_shards`.
        features_are: `grid`, `regions` or nothing, see `Manifest`.
        account: split -> what became of the source's records, see `Manifest`.
    """
    index, fields = {}, {}
    for split, of_split in parts.items():
        buffer = io.BytesIO()
        np.save(buffer, np.array([o for part in of_split for o in part.offsets], dtype=np.int64).reshape(-1, 2))
        file = f"{name}-{split}.index.npy"
        write_atomic(dir / file, buffer.getvalue())
        index[split] = IndexInfo(file, hashlib.sha256(buffer.getvalue()).hexdigest())
        merged = FieldCounts()
        for part in of_split:
            merged.merge(part.fields)
        fields[split] = merged.summary()
        for path, numbers in identity.summary([one for part in of_split for one in part.contents]).items():
            fields[split].setdefault(path, {}).update(numbers)
    counts = None
    if labels is not None:
        counts = [sum(part.label_counts.get(label, 0) for part in parts[label_split]) for label in labels]
    manifest = Manifest(
        name=name,
        licence=licence,
        source=source,
        samples_per_shard=samples_per_shard,
        splits={split: [part.shard for part in of_split] for split, of_split in parts.items()},
        index=index,
        fields=fields,
        labels=labels,
        label_counts=counts,
        towers=towers or {},
        features_are=features_are,
        account=account or {},
        dir=str(dir),
    )
    manifest.save(dir)
    return manifest


class FieldCounts:
    """Simple statistics of the fields of many samples; those of several shards can be merged."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, Any]] = {}

    def add(self, sample: Any) -> None:
        self._put("images", "images", len(sample.images))
        if sample.features is not None:
            self._put("features", str(sample.features.dtype), sample.features.size)
        for name, array in sample.arrays.items():
            self._put(name, str(array.dtype), array.size)
        for name, value in sample.record.items():
            self._value(name, value)

    def merge(self, other: dict[str, dict[str, Any]]) -> None:
        for path, theirs in other.items():
            mine = self.counts.setdefault(path, {"types": [], "present": 0, "min": theirs["min"], "sum": 0, "max": 0})
            mine["types"] = sorted({*mine["types"], *theirs["types"]})
            mine["present"] += theirs["present"]
            mine["sum"] += theirs["sum"]
            mine["min"], mine["max"] = min(mine["min"], theirs["min"]), max(mine["max"], theirs["max"])

    def summary(self) -> dict[str, dict[str, Any]]:
        """Field path -> {type, present, min, mean, max}; `present` counts values, so items for a path with `[]`."""
        return {
            path: {
                "type": "|".join(c["types"]),
                "present": c["present"],
                "min": c["min"],
                "mean": round(c["sum"] / c["present"], 4),
                "max": c["max"],
            }
            for path, c in sorted(self.counts.items())
        }

    def _value(self, path: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            self._put(path, type(value).__name__, int(bool(value)))
        elif isinstance(value, (int, float)):
            self._put(path, type(value).__name__, value)
        elif isinstance(value, (str, list, dict)):
            self._put(path, type(value).__name__, len(value))
            if isinstance(value, list):
                for item in value:
                    self._value(path + "[]", item)
            elif isinstance(value, dict):
                for name, item in value.items():
                    self._value(f"{path}.{name}", item)

    def _put(self, path: str, type_name: str, size: float) -> None:
        count = self.counts.get(path)
        if count is None:
            self.counts[path] = {"types": [type_name], "present": 1, "min": size, "sum": size, "max": size}
            return
        if type_name not in count["types"]:
            count["types"] = sorted([*count["types"], type_name])
        count["present"] += 1
        count["sum"] += size
        count["min"], count["max"] = min(count["min"], size), max(count["max"], size)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _labels_of(record: dict[str, Any]) -> Iterable[str]:
    """Entries for the closed label list: all answers of all questions, or the class name."""
    if "class_name" in record:
        yield record["class_name"]
    for question in record.get("questions", []):
        yield from question["answers"]
