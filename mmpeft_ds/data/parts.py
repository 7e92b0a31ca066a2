"""Parts: what finished shards add to the manifest, kept beside them until it is written.

A part lies on disk, and a process that holds many of them holds their names, sizes and hashes alone.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft_ds.data.manifest import ShardInfo
from mmpeft_ds.files import replacing, sha256, write_atomic

PARTS = ".parts"


@dataclass
class Counts:
    """Numbers of one shard.

    Attributes:
        fields: field path -> `FieldCounts` numbers.
        labels: answer or class name -> occurrences.
    """

    fields: dict[str, dict[str, Any]]
    labels: dict[str, int]


@dataclass(frozen=True)
class Part:
    """The contribution of one finished shard to the manifest.

    Attributes:
        dir: directory of the data set.
        shard: the tar file.
    """

    dir: Path
    shard: ShardInfo

    @property
    def offsets(self) -> np.ndarray:
        """(begin, length) in bytes of every sample, as `Manifest.offsets` gives them."""
        return self.arrays()["offsets"]

    def arrays(self) -> dict[str, np.ndarray]:
        """`offsets`, and what `identity.Contents.arrays` gives; read again at every call."""
        with np.load(arrays_path(self.dir, self.shard.file), allow_pickle=False) as stored:
            return dict(stored)

    def counts(self) -> Counts:
        """Numbers of the shard; read again at every call."""
        raw = json.loads(part_path(self.dir, self.shard.file).read_text("utf-8"))
        return Counts(raw["fields"], raw["label_counts"])


def shard_file(name: str, split: str, number: int) -> str:
    """File name of a shard."""
    return f"{name}-{split}-{number:06d}.tar"


def part_path(dir: Path, file: str) -> Path:
    """Path of the part file of the shard `file`, which is kept until the manifest is written."""
    return dir / PARTS / f"{file}.json"


def arrays_path(dir: Path, file: str) -> Path:
    """Path of the arrays that belong to the part file."""
    return dir / PARTS / f"{file}.npz"


def save_part(
    dir: Path,
    shard: ShardInfo,
    fields: Mapping[str, dict[str, Any]],
    labels: Mapping[str, int],
    arrays: Mapping[str, np.ndarray],
) -> Part:
    """Write the part of a shard that is in place; the part file comes last and says that the shard is finished."""
    with replacing(arrays_path(dir, shard.file)) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
    content = {"shard": asdict(shard), "fields": fields, "label_counts": labels}
    write_atomic(part_path(dir, shard.file), json.dumps(content, ensure_ascii=False).encode())
    return Part(dir, shard)


def finished_part(dir: Path, file: str) -> Part | None:
    """The part of a shard that an earlier run has finished, if the tar has not changed since; None otherwise."""
    try:
        raw = json.loads(part_path(dir, file).read_text("utf-8"))
        part = Part(dir, ShardInfo(**raw["shard"]))
        whole = raw.keys() >= {"fields", "label_counts"} and len(part.offsets) == part.shard.samples
        good = whole and (dir / file).stat().st_size == part.shard.bytes and sha256(dir / file) == part.shard.sha256
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return part if good else None
