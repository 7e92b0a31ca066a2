"""Micro-batches from feature shards, gathered as a whole; the same as when they are read sample by sample.

Records are parsed once and kept, as are the texts and targets that a task reads from them without drawing at random. A
micro-batch with anything unusual (a bad sample, several images, a record that cannot be used) is left to the stream,
which reads it sample by sample.
"""

# S slots of a micro-batch, D width, V augmented passes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import Described, PackedBatch, changes_of, with_images
from mmpeft_ds.data.feature_columns import Columns, ShardColumns, reachable
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.parsing import check_finite, json_object, one_sample
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.errors import BadSample

REMEMBERED = 2**16  # samples of a source whose texts and targets are kept; some hundred bytes to some kB each


@dataclass(frozen=True)
class _Read:
    """Texts and targets of a record; `fixed`: read without drawing at random, so the same in every epoch."""

    sample_id: str
    record: dict[str, Any]
    texts: list[Any]
    targets: list[Any]
    fixed: bool


class _Memory:
    """Samples of a split that were read before, in columns, so that many are looked up at once.

    Attributes:
        place: (n,) int32 row of each sample in the columns; row 0 stands for all samples not read yet.
        keys: uint64, of the sample ids.
        read: `_Read` or None.
        plain: bool: fixed, with exactly one text; `names`, `records`, `texts`, `targets` and `raw` are its parts.
    """

    COLUMNS = ("names", "records", "texts", "targets", "raw")

    def __init__(self, n: int):
        rows = 1 + min(n, REMEMBERED)
        self.place, self.count = np.zeros(n, np.int32), 0
        self.keys, self.plain, self.read = np.zeros(rows, np.uint64), np.zeros(rows, bool), np.empty(rows, object)
        for name in self.COLUMNS:
            setattr(self, name, np.empty(rows, object))

    @property
    def full(self) -> bool:
        """Whether no sample can be added."""
        return self.count + 1 >= len(self.read)

    def add(self, number: int, one: _Read) -> None:
        """Add a sample that is not there yet, while there is room."""
        self.count += 1
        row = self.place[number] = self.count
        self.read[row], self.keys[row] = one, order.key_of(one.sample_id)
        if one.fixed and len(one.texts) == 1:
            self.plain[row] = True
            self.names[row], self.records[row] = one.sample_id, one.record
            self.texts[row], self.targets[row], self.raw[row] = one.texts[0], one.targets[0], _raw(one.texts[0])


class FeatureBatches:
    """Micro-batches of one source.

    Args:
        source: a `StreamSource` of feature shards. Its `image_transform.row(rows, seeds)` gives the row of the stored
            features that samples with these seeds take (numbers or arrays), and its `collate_images` also takes one
            (S, D) tensor of such rows.
        reader: of its split.
        epoch_key: epoch -> key, from which with the key of a sample's id the seed of its random choices is made.
    """

    def __init__(self, source: Any, reader: ShardReader, epoch_key: Callable[[int], int]):
        self.source, self.epoch_key = source, epoch_key
        self.columns = Columns(reader)
        self.firsts = np.cumsum([0, *(shard.samples for shard in reader.shards)])
        self._start()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_generator")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._memory, self._generator = _Memory(int(self.firsts[-1])), torch.Generator()

    @staticmethod
    def possible(source: Any, reader: ShardReader) -> bool:
        """Whether a source can be read this way."""
        return bool(source.manifest.towers) and hooks_of(source.image_transform).takes_one_row and reachable(reader)

    def make(
        self, epoch: int, shards: np.ndarray, samples: np.ndarray, slots: np.ndarray, size: int
    ) -> PackedBatch | None:
        """The micro-batch with sample `samples[i]` of shard `shards[i]` in slot `slots[i]`.

        Args:
            slots: increasing, below `size`; the others are padding.

        Returns:
            None if it has to be read sample by sample.

        Raises:
            BadSample: if the tensors of the texts cannot be made; then as well.
        """
        by_shard = _grouped(shards)
        columns = {s: self.columns.shard(s) for s in by_shard}
        if not len(slots) or not all(columns[s].good[samples[own]].all() for s, own in by_shard.items()):
            return None
        if len({(c.dtype, c.rows, c.width) for c in columns.values()}) > 1:
            return None
        numbers, memory = self.firsts[shards] + samples, self._memory
        key = self.epoch_key(epoch)
        try:
            for i in np.flatnonzero(memory.place[numbers] == 0).tolist():
                if not memory.full:
                    memory.add(int(numbers[i]), self._read(key, columns, int(shards[i]), int(samples[i])))
            rows = memory.place[numbers]
            plain = bool(memory.plain[rows].all())
            pairs = [] if plain else zip(shards.tolist(), samples.tolist(), strict=True)
            read = [self._read(key, columns, *pair) for pair in pairs]
        except BadSample:
            return None
        keys = memory.keys[rows] if plain else np.array([order.key_of(r.sample_id) for r in read], np.uint64)
        images = self._images(order.combined_many(key, keys), by_shard, columns, samples)
        if plain:
            names, records, texts, targets, raw = (getattr(memory, name)[rows] for name in _Memory.COLUMNS)
            lists = (texts.tolist(), targets.tolist(), raw.tolist())
            return self._packed(images, slots, size, names, records, slots, *lists)
        texts = [text for one in read for text in one.texts]
        targets = [target for one in read for target in one.targets]
        names, records = [one.sample_id for one in read], [one.record for one in read]
        owner = np.repeat(slots, [len(one.texts) for one in read])
        return self._packed(images, slots, size, names, records, owner, texts, targets, [_raw(t) for t in texts])

    def close(self) -> None:
        """Close the files."""
        self.columns.close()

    def _read(self, epoch_key: int, columns: dict[int, ShardColumns], shard: int, sample: int) -> _Read:
        """Texts and targets of one sample. Raises BadSample."""
        known = self._memory.read[self._memory.place[self.firsts[shard] + sample]]
        if known is not None and known.fixed:
            return known
        if known is None:
            sample_id = f"{self.source.manifest.name}/{self.columns.key(shard, sample)}"
            record = self._record(columns[shard], sample)
        else:
            sample_id, record = known.sample_id, known.record
        generator = self._generator.manual_seed(order.combined(epoch_key, order.key_of(sample_id)))
        # Find out whether the task draws at random only for samples that can be kept.
        new = known is None and not self._memory.full
        before = _state(generator) if new else b""
        with one_sample():
            texts, targets = self.source.read(record, generator)
            if len(texts) != len(targets):
                raise BadSample("type")
            texts = with_images(texts, [None])
        return _Read(sample_id, record, texts, targets, new and _state(generator) == before)

    def _record(self, columns: ShardColumns, sample: int) -> dict[str, Any]:
        """The json of a sample with the features of its captions under `text`. Raises BadSample."""
        record = json_object(columns.record(sample))
        check_finite(columns.features(sample))
        if (captions := columns.text(sample)) is not None:
            check_finite(captions)
            record["text"] = torch.from_numpy(np.array(captions))  # a copy, since the file may be closed
        if any(name not in record for name in self.source.fields):
            raise BadSample("field")
        if self.source.identify:
            record.setdefault(PICTURE, content_id([columns.content(sample)]))
        return record

    def _images(
        self, seeds: np.ndarray, by_shard: dict[int, np.ndarray], columns: dict[int, ShardColumns], samples: np.ndarray
    ) -> Tensor:
        """(S, D) rows in the dtype that is stored."""
        first = next(iter(columns.values()))
        rows = np.zeros(len(samples), np.int64)
        rows[:] = self.source.image_transform.row(first.rows, seeds)
        images = np.empty((len(samples), first.width), first.dtype)
        for shard, own in by_shard.items():
            images[own] = columns[shard].images(samples[own], rows[own])
        return torch.from_numpy(images)

    def _packed(
        self, images: Tensor, slots: np.ndarray, size: int, names: Any, records: Any, text_owner: np.ndarray,
        texts: list[Any], targets: list[Any], raw: list[Any],
    ) -> PackedBatch:  # fmt: skip
        """The same as `data.batch.pack` of these samples. Later batches share the records: do not change them."""
        sample_id, kept = list(names), list(records)
        if len(slots) < size:
            sample_id, kept = [""] * size, [{} for _ in range(size)]
            for slot, name, record in zip(slots.tolist(), names, records, strict=True):
                sample_id[slot], kept[slot] = name, record
        weight = torch.zeros(size)
        weight[torch.from_numpy(slots)] = 1.0
        source = self.source
        collated = source.collate_texts(texts) if texts else {}
        return PackedBatch(
            sample_id=sample_id,
            weight=weight,
            images=source.collate_images(images),
            image_owner=torch.from_numpy(slots),
            texts=dict(collated),
            text_owner=torch.from_numpy(text_owner),
            targets=source.collate_targets(targets) if targets else {},
            records=kept,
            raw_texts=raw,
            bad=[],
            changes=changes_of(collated, len(texts)),
        )


def _grouped(shards: np.ndarray) -> dict[int, np.ndarray]:
    """Number of a shard -> where it stands, in order."""
    order = np.argsort(shards, kind="stable")
    numbers, first = np.unique(shards[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, first[1:]), strict=False))  # of no shards one empty part


def _raw(text: Any) -> Any:
    return text.text if isinstance(text, Described) else text


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
