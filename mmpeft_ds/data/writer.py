"""Writing of shards: plain WebDataset tars whose bytes depend on the samples alone.

Each shard is a job: it is written under a temporary name, renamed, and only then described by a part file. So an
interrupted job leaves nothing that looks finished, and jobs may run in any order, in any process and on any node.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft_ds.data import identity
from mmpeft_ds.data.field_counts import FieldCounts
from mmpeft_ds.data.formats import STORED
from mmpeft_ds.data.identity import Contents
from mmpeft_ds.data.manifest import IndexInfo, Manifest, ShardInfo, sample_key
from mmpeft_ds.data.parsing import check_nesting, check_questions, npy_array
from mmpeft_ds.data.parts import PARTS, Part, save_part, shard_file
from mmpeft_ds.data.tar import TarWriter
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.files import replacing, sha256

# json.dumps would make an encoder for every record.
_encoded = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


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


def members(sample: Any) -> dict[str, bytes]:
    """Extension -> bytes of a raw sample: `json`; `jpg`, or `0.jpg`, `1.jpg`, ... if several; `npy` for features.

    Args:
        sample: a `RawSample`, or anything else with its attributes.

    Raises:
        ValueError: if an image extension is unknown, the record is no JSON, or features hold Python objects.
    """
    record = {**sample.record, "source_name": sample.name}
    try:
        parts = {"json": _encoded(record).encode()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{sample.name}: the record cannot be stored as JSON ({error})") from error
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


def write_shard(
    dir: Path,
    name: str,
    split: str,
    number: int,
    first: int,
    samples: Iterable[Any],
    numbers: Callable[[], dict[str, np.ndarray]] = dict,
) -> Part:
    """Write shard `number` of a split, whose first sample is the split's sample `first`, and its part file.

    Args:
        numbers: gives further arrays of the part, once all samples have been taken.

    Returns:
        its part; the tar and the part file are in place and on disk.

    Raises:
        BadInput: for a sample that training would refuse: see `data.parsing`, or stored features of another width.
    """
    file = shard_file(name, split, number)
    counts, labels, contents = FieldCounts(), Counter(), Contents()
    widths: dict[str, int] = {}
    with (
        replacing(dir / file, dir / PARTS / f"{file}.{os.getpid()}.tmp") as temporary,
        open(temporary, "wb", buffering=0) as stream,
        TarWriter(stream) as tar,
    ):
        for i, sample in enumerate(samples):
            parts = members(sample)
            widths.update(_checked(sample, parts, widths))
            tar.add(sample_key(split, first + i), parts)
            counts.add(sample)
            labels.update(_labels_of(sample.record))
            contents.add(sample)
        size, digest, offsets = tar.close()
    shard = ShardInfo(file, len(offsets), size, digest)
    return save_part(dir, shard, counts.counts, labels, {"offsets": offsets, **contents.arrays(), **numbers()})


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
    label_counts: dict[str, int] = dict.fromkeys(labels or [], 0)
    for split, of_split in parts.items():
        index[split] = _write_index(dir, f"{name}-{split}.index.npy", of_split)
        merged = FieldCounts()
        for part in of_split:
            counts = part.counts()
            merged.merge(counts.fields)
            if split == label_split:
                for label in label_counts.keys() & counts.labels.keys():
                    label_counts[label] += counts.labels[label]
        fields[split] = merged.summary()
        for path, numbers in identity.summary(lambda shards=of_split: (part.arrays() for part in shards)).items():
            fields[split].setdefault(path, {}).update(numbers)
    manifest = Manifest(
        name=name,
        licence=licence,
        source=source,
        samples_per_shard=samples_per_shard,
        splits={split: [part.shard for part in of_split] for split, of_split in parts.items()},
        index=index,
        fields=fields,
        labels=labels,
        label_counts=None if labels is None else [label_counts[label] for label in labels],
        towers=towers or {},
        features_are=features_are,
        account=account or {},
        dir=str(dir),
    )
    manifest.save(dir)
    return manifest


def _write_index(dir: Path, file: str, parts: list[Part]) -> IndexInfo:
    """Write the side file of a split, one shard after the other."""
    total = sum(part.shard.samples for part in parts)
    with replacing(dir / file) as temporary:
        with open(temporary, "wb") as stream:
            head = {"descr": "<i8", "fortran_order": False, "shape": (total, 2)}
            np.lib.format.write_array_header_1_0(stream, head)
            for part in parts:
                stream.write(part.offsets.astype("<i8").tobytes())
        digest = sha256(temporary)
    return IndexInfo(file, digest)


def _checked(sample: Any, parts: dict[str, bytes], widths: dict[str, int]) -> dict[str, int]:
    """Width of each array of a sample. Raises BadInput if training would refuse the sample, or one differs."""
    width_of = {}
    try:
        check_nesting(parts["json"])
        check_questions(sample.record)
        for name in (name for name in parts if name.endswith("npy")):
            width_of[name] = npy_array(parts[name]).shape[-1:]
    except BadSample as bad:
        raise BadInput(f"{sample.name}: cannot be stored ({bad}). Mend it in the source, or leave it out.") from bad
    for name, width in width_of.items():
        if widths.get(name, width) != width:
            raise BadInput(f"{sample.name}: {name} has width {width}, and {widths[name]} in the samples before it.")
    return width_of


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
