"""Feature samples that were read before, in columns, so that those of many batches are looked up at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import Described, hash_ids

# Samples of a source whose texts and targets are kept, as long as their records and features of captions are not more
# than so many bytes in their shard; as objects of Python they take a few times that.
REMEMBERED = 2**16
REMEMBERED_BYTES = 2**27


@dataclass(slots=True)
class Read:
    """Texts and targets of a record; `fixed`: read without drawing at random, so the same in every epoch."""

    sample_id: str
    record: dict[str, Any]
    texts: list[Any]
    targets: list[Any]
    fixed: bool


class Memory:
    """Samples of a split that were read before.

    Args:
        n: samples of the split.
        collate: list of targets -> tensors with one row each, where rows may be kept; None: targets are kept as read.

    Attributes:
        bytes: of what was read of those, in their shards.
        place: (n,) int32 row of each sample in the columns; row 0 stands for all samples not read yet.
        keys, hashes: uint64, `order.key_of` and `batch.hash_id` of the sample ids.
        plain: bool: fixed, with exactly one text; `names`, `records`, `texts`, `raw` and `targets` are its parts. Of
            these there is no `Read`: its lists are objects that Python looks through for garbage again and again.
        common: of `texts` and `raw` those of which all samples have the very same object, as where texts are left out;
            None before the first sample.
        collated: rows of the collated targets of those, where `collate` is given.
        others: `Read` of those that are not plain, else None.
    """

    COLUMNS = ("names", "records", "texts", "raw")

    def __init__(self, n: int, collate: Callable[[list[Any]], dict[str, Tensor]] | None):
        rows = 1 + min(n, REMEMBERED)
        self.collate, self.collated = collate, dict[str, Tensor]()
        self.place, self.count, self.bytes = np.zeros(n, np.int32), 0, 0
        self.common: dict[str, Any] | None = None
        self.keys, self.hashes = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
        self.plain, self.others = np.zeros(rows, bool), np.empty(rows, object)
        for name in (*self.COLUMNS, "targets"):
            setattr(self, name, np.empty(rows, object))

    def fitting(self, numbers: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Which of some samples are new and have room: their indices in `numbers`.

        Args:
            sizes: (n,) bytes of each sample of the split.
        """
        new = np.flatnonzero(self.place[numbers] == 0)[: len(self.others) - 1 - self.count]
        return new[self.bytes + sizes[numbers[new]].cumsum() <= REMEMBERED_BYTES] if len(new) else new

    def read(self, number: int) -> Read | None:
        """What was read of a sample; None if it was not."""
        row = int(self.place[number])
        if not self.plain[row]:
            return self.others[row]
        return Read(self.names[row], self.records[row], [self.texts[row]], [self.targets[row]], True)

    def add(self, numbers: np.ndarray, read: list[Read]) -> None:
        """Add samples that are not there yet, for which there is room."""
        plain = np.array([one.fixed and len(one.texts) == 1 for one in read])
        if plain.any():
            single = [one for one, is_plain in zip(read, plain.tolist(), strict=True) if is_plain]
            parts = ([one.sample_id for one in single], [one.record for one in single])
            firsts = ([one.texts[0] for one in single], [one.targets[0] for one in single])
            self.add_plain(numbers[plain], *parts, *firsts)
        others = [one for one, is_plain in zip(read, plain.tolist(), strict=True) if not is_plain]
        self.others[self._rows(numbers[~plain], [one.sample_id for one in others])] = _objects(others)

    def add_plain(
        self,
        numbers: np.ndarray,
        names: list[str],
        records: list[dict[str, Any]],
        texts: list[Any],
        targets: list[Any],
    ) -> None:
        """The same for samples that were read without drawing at random, with one text and one target each."""
        collated = self.collate(targets) if self.collate else {}
        rows = self._rows(numbers, names)
        self.plain[rows] = True
        columns = dict(names=names, records=records, texts=texts, raw=list(map(raw_of, texts)), targets=targets)
        for name, column in columns.items():
            getattr(self, name)[rows] = _objects(column)
        if self.common is None:
            self.common = {name: columns[name][0] for name in ("texts", "raw")}
        self.common = {k: one for k, one in self.common.items() if all(map(is_, columns[k], repeat(one)))}
        for name, tensor in collated.items():
            if name not in self.collated:
                self.collated[name] = tensor.new_zeros(len(self.others), *tensor.shape[1:])
            self.collated[name][rows] = tensor

    def _rows(self, numbers: np.ndarray, names: list[str]) -> slice:
        """New rows for samples with these ids."""
        rows = slice(self.count + 1, self.count + 1 + len(names))
        self.count += len(names)
        self.keys[rows], self.hashes[rows] = order.keys_of(names), hash_ids(names)
        self.place[numbers] = np.arange(rows.start, rows.stop)
        return rows

    def columns(self, rows: np.ndarray) -> list[list[Any]]:
        """COLUMNS of plain samples."""
        common = self.common or {}
        return [
            [common[name]] * len(rows) if name in common else getattr(self, name)[rows].tolist()
            for name in self.COLUMNS
        ]

    def targets_of(self, rows: np.ndarray) -> dict[str, Tensor] | list[Any]:
        """Those of plain samples: collated where they are, else as the task reads them."""
        if not self.collate:
            return self.targets[rows].tolist()
        chosen = torch.from_numpy(rows.astype(np.int64))
        return {name: tensor.index_select(0, chosen) for name, tensor in self.collated.items()}


def raw_of(text: Any) -> Any:
    """A text as a batch shows it."""
    return text.text if isinstance(text, Described) else text


def _objects(values: Sequence[Any]) -> np.ndarray:
    """(n,) array of these very objects, also where they are lists."""
    return np.fromiter(values, object, len(values))
