"""Base class of data sources. One file per data set in this folder; its `ENTRY` is a subclass of `Source`."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from mmpeft_ds.data.writer import RawSample

__all__ = ["RawSample", "Source"]


class Source(abc.ABC):
    """A data set as it comes, turned into raw samples.

    Attributes:
        Options: dataclass of command-line options of this source.
        licence: SPDX name or a short statement, written to the manifest.
    """

    Options: ClassVar[type]
    licence: str = "unknown"

    def __init__(self, options: Any):
        self.options = options

    def index(self, folder: Path) -> None:  # noqa: B027 - most sources need none
        """Read once what `splits`, `count` and `samples` need, and keep it under `folder`.

        Called before them, in every process that makes shards; where `folder` holds a complete index already, it is
        used. The folder is removed at the end. Sources that keep everything in memory, or read packages, need no
        index: the default does nothing.
        """

    @abc.abstractmethod
    def splits(self) -> list[str]:
        """Split names, in the order in which they are written. Raises BadInput if the source is not there."""

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """Origin of the shards: file or package name -> version or sha256."""

    def labels(self, split: str) -> list[str] | None:
        """Closed label or answer list of the data set, or None."""
        return None

    @abc.abstractmethod
    def count(self, split: str) -> int:
        """Samples of a split."""

    @abc.abstractmethod
    def samples(self, split: str, start: int = 0) -> Iterator[RawSample]:
        """Samples `start`, `start`+1, ... in a fixed order, the same in every run."""

    def empty(self) -> list[str]:
        """Splits that were read and have no sample, for the report after preparation; none by default."""
        return []

    def account(self, split: str) -> dict[str, Any]:
        """Counts of the records of a split, for the report after preparation; empty where all became samples.

        Returns:
            any of `records`, `pictures`, `texts`: numbers; `expected`: name of such a number -> what the publishers
            of the data set count; `aside`: reason -> [number of records, their first ten names];
            `uncaptioned`: the same of pictures or videos that are listed without any text. prepare.py adds `also_in`
            and `bad`, see `data_prep.common.duplicates` and `data_prep.common.bad_pictures`.
        """
        return {}
