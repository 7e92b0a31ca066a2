"""What a data source must offer. One file per data set in this folder; `ENTRY` in it satisfies `Source`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, runtime_checkable

from mmpeft_ds.data.writer import RawSample

__all__ = ["RawSample", "Source"]


@runtime_checkable
class Source(Protocol):
    """A data set as it comes, turned into raw samples.

    Attributes:
        Options: dataclass of command-line options of this source.
        licence: SPDX name or a short statement, written to the manifest.
    """

    Options: ClassVar[type]
    licence: str

    def __init__(self, options: Any): ...

    def splits(self) -> list[str]:
        """Split names, in the order in which they are written. Raises BadInput if the source is not there."""

    def fingerprint(self) -> dict[str, str]:
        """What the shards were made from: file or package name -> version or sha256."""

    def labels(self, split: str) -> list[str] | None:
        """Closed label or answer list of the data set, or None."""

    def count(self, split: str) -> int: ...

    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        """Samples `start`, `start`+1, ... in a fixed order, the same in every run."""
