"""A manifest for a data set that is not prepared yet, so that a run can be sized beforehand; all of it is assumed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mmpeft_ds.data.manifest import FILE, IndexInfo, Manifest, ShardInfo, local_path
from mmpeft_ds.errors import BadInput

SOURCE = "assumed"  # `Manifest.source["name"]`


@dataclass(frozen=True)
class Assumed:
    """Assumptions about a data set that is not there.

    Attributes:
        samples: of each split.
        labels: length of the closed list of answers or classes.
        width: of stored features.
    """

    samples: int = 10_000
    labels: int = 1_000
    width: int = 768

    def __post_init__(self) -> None:
        if min(self.samples, self.labels, self.width) < 1:
            raise BadInput("--samples, --labels: must be 1 or more.")

    def manifest(self, dir: str, splits: Iterable[str], features: bool) -> Manifest:
        """A manifest with these splits, a list of labels and no fields.

        Args:
            features: the backbone reads stored features, and nothing else says how wide they are.
        """
        names = list(dict.fromkeys(splits))
        towers = {"key": SOURCE, "image_width": self.width, "text_width": self.width} if features else {}
        return Manifest(
            name=re.sub(r"[^a-z0-9_-]+", "-", Path(dir).name.lower()).strip("-") or SOURCE,
            licence="unknown",
            source={"name": SOURCE},
            samples_per_shard=self.samples,
            splits={s: [ShardInfo(f"{SOURCE}-{s}-000000.tar", self.samples, 1, "0" * 64)] for s in names},
            index={s: IndexInfo(f"{SOURCE}-{s}.index.npy", "0" * 64) for s in names},
            labels=[f"assumed {i}" for i in range(self.labels)],
            label_counts=[1] * self.labels,
            towers=towers,
            dir=dir,
        )


def is_assumed(manifest: Manifest) -> bool:
    """Whether the manifest stands for a data set that is not there."""
    return manifest.source.get("name") == SOURCE


def is_absent(dir: str) -> bool:
    """Whether a local directory holds no manifest."""
    local = local_path(dir)
    return local is not None and not (Path(local) / FILE).exists()


def is_subset_absent(file: str, dir: str) -> bool:
    """Whether a subset file is neither at its local path nor below a local directory."""
    places = [local_path(file), local_path(f"{dir}/{file}")]
    return all(place is not None and not Path(place).exists() for place in places)
