"""Whole micro-batches from feature shards, gathered instead of read sample by sample; what comes out is the same.

Records are parsed once and remembered, and so is what a task reads from them without drawing at random. Whatever is
not plain (a bad sample, several images, a record that cannot be used) sends its micro-batch the slow way, which knows
what to do with it.
"""

# S slots of a micro-batch, D width, V augmented passes

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data.batch import Described, PackedBatch, with_images
from mmpeft_ds.data.feature_columns import Columns, ShardColumns, reachable
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.errors import BadSample

REMEMBERED = 2**16  # samples of a source whose texts and targets are kept; some hundred bytes to some kB each


@dataclass(frozen=True)
class _Read:
    """What a task reads from a record; `fixed` if it draws nothing at random, so that every epoch reads the same."""

    sample_id: str
    record: dict[str, Any]
    texts: list[Any]
    targets: list[Any]
    fixed: bool


class FeatureBatches:
    """Micro-batches of one source.

    Args:
        source: a `StreamSource` of feature shards whose `image_transform` says by `row(rows, seed)` which row of the
            stored features a sample takes; `collate_images` then also takes one (S, D) tensor of such rows.
        reader: of its split.
        seed_of: (epoch, sample id) -> seed of the sample's random choices.
    """

    def __init__(self, source: Any, reader: ShardReader, seed_of: Callable[[int, str], int]):
        self.source, self.seed_of = source, seed_of
        self.columns = Columns(reader)
        self._remembered: dict[tuple[int, int], _Read] = {}
        self._generator = torch.Generator()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_remembered": {}, "_generator": torch.Generator()}

    @staticmethod
    def possible(source: Any, reader: ShardReader) -> bool:
        """Whether a source can be read this way at all."""
        return bool(source.manifest.towers) and hasattr(source.image_transform, "row") and reachable(reader)

    def make(
        self, epoch: int, shards: np.ndarray, samples: np.ndarray, slots: Sequence[int], size: int
    ) -> PackedBatch | None:
        """The micro-batch whose slot `slots[i]` holds sample `samples[i]` of `shards[i]`; None: only the slow way can.

        Args:
            slots: increasing, below `size`; the others are padding.
        """
        by_shard = {int(s): np.flatnonzero(shards == s) for s in np.unique(shards)}
        columns = {s: self.columns.shard(s) for s in by_shard}
        if not len(slots) or not all(columns[s].good[samples[own]].all() for s, own in by_shard.items()):
            return None
        if len({(c.dtype, c.rows, c.width) for c in columns.values()}) > 1:
            return None
        try:
            read = [
                known if (known := self._remembered.get(pair)) and known.fixed else self._read(epoch, columns, pair)
                for pair in zip(shards.tolist(), samples.tolist(), strict=True)
            ]
        except BadSample:
            return None
        return self._packed(read, self._images(epoch, by_shard, columns, samples, read), slots, size)

    def close(self) -> None:
        """Let go of the files."""
        self.columns.close()

    def _read(self, epoch: int, columns: dict[int, ShardColumns], pair: tuple[int, int]) -> _Read:
        """Texts and targets of sample `pair`, (shard, sample). Raises BadSample."""
        known = self._remembered.get(pair)
        if known is None:
            sample_id = f"{self.source.manifest.name}/{self.columns.key(*pair)}"
            record = self._record(columns[pair[0]], pair[1])
        else:
            sample_id, record = known.sample_id, known.record
        generator = self._generator.manual_seed(self.seed_of(epoch, sample_id))
        before = _state(generator) if known is None else b""
        try:
            texts, targets = self.source.read(record, generator)
            if len(texts) != len(targets):
                raise BadSample("type")
            texts = with_images(texts, 1)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise BadSample("type", str(error)) from error
        found = _Read(sample_id, record, texts, targets, known is None and _state(generator) == before)
        if known is None and len(self._remembered) < REMEMBERED:
            self._remembered[pair] = found
        return found

    def _record(self, columns: ShardColumns, sample: int) -> dict[str, Any]:
        """The json of a sample with the features of its captions under `text`. Raises BadSample."""
        try:
            record = json.loads(columns.record(sample))
            if (captions := columns.text(sample)) is not None:
                record["text"] = torch.from_numpy(np.array(captions))  # a copy: the file may go
        except (ValueError, TypeError) as error:
            raise BadSample("json", str(error)) from error
        if any(name not in record for name in self.source.fields):
            raise BadSample("field")
        return record

    def _images(
        self,
        epoch: int,
        by_shard: dict[int, np.ndarray],
        columns: dict[int, ShardColumns],
        samples: np.ndarray,
        read: list[_Read],
    ) -> Tensor:
        """(S, D) rows as they are stored."""
        first = next(iter(columns.values()))
        choose = self.source.image_transform.row
        if first.rows == 1:
            rows = np.zeros(len(read), np.int64)
        else:
            rows = np.array([choose(first.rows, self.seed_of(epoch, one.sample_id)) for one in read], np.int64)
        found = np.empty((len(read), first.width), first.dtype)
        for shard, own in by_shard.items():
            found[own] = columns[shard].images(samples[own], rows[own])
        return torch.from_numpy(found)

    def _packed(self, read: list[_Read], images: Tensor, slots: Sequence[int], size: int) -> PackedBatch:
        """As `data.batch.pack` of the same samples."""
        source = self.source
        texts = [text for one in read for text in one.texts]
        targets = [target for one in read for target in one.targets]
        at = torch.tensor(slots, dtype=torch.int64)
        counts = torch.tensor([len(one.texts) for one in read], dtype=torch.int64)
        sample_id, records = [""] * size, [{} for _ in range(size)]
        for slot, one in zip(slots, read, strict=True):
            sample_id[slot], records[slot] = one.sample_id, dict(one.record)
        weight = torch.zeros(size)
        weight[at] = 1.0
        return PackedBatch(
            sample_id=sample_id,
            weight=weight,
            images=source.collate_images(images),
            image_owner=at,
            texts=source.collate_texts(texts) if texts else {},
            text_owner=torch.repeat_interleave(at, counts),
            targets=source.collate_targets(targets) if targets else {},
            records=records,
            raw_texts=[t.text if isinstance(t, Described) else t for t in texts],
            bad=[],
        )


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
