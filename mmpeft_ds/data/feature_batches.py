"""Micro-batches from feature shards, gathered as a whole; the same as when they are read sample by sample.

Records are parsed once and kept, as are the texts and targets that a task reads from them without drawing at random. A
micro-batch with anything unusual (a bad sample, several images, a record that cannot be used) is left to the stream,
which reads it sample by sample.
"""

# S slots of a micro-batch, D width, V augmented passes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import CollatedTexts, Counts, PackedBatch, changes_of, with_images
from mmpeft_ds.data.feature_columns import Columns, reachable
from mmpeft_ds.data.feature_memory import Memory, Read, raw_of
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.manifest import sample_keys
from mmpeft_ds.data.parsing import check_finite, json_objects, one_sample
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.errors import BadSample

# Samples that are read for the first time together: few, so that what is made on the way is gone before Python looks
# for garbage a second time.
TOGETHER = 96
READ = 2**20  # bytes of rows that are copied at a time, or of one micro-batch: they stay in a core's cache


@dataclass(slots=True)
class _Found:
    """Where samples are.

    Attributes:
        shards, addresses: (S,) of each, see `Columns.rows`.
        kind: see `feature_columns.ShardColumns.kind`.
        rows: (S,) of `Memory`.
        read: what was read of samples that are not all plain; None: all are.
    """

    shards: np.ndarray
    addresses: np.ndarray
    kind: tuple[np.dtype, int, int]
    rows: np.ndarray
    read: list[Read] | None


@dataclass(slots=True)
class Ahead:
    """Samples of several micro-batches, found together; all plain, see `Memory`.

    Attributes:
        size: slots of each micro-batch, all filled.
        found: where their rows are.
        columns: names, records, texts and raw texts of all samples.
        targets: collated, of all samples, or as the task reads them.
        hashes: of each micro-batch, `PackedBatch.keys_hash`.
        numbers: of all samples, `PackedBatch.id_numbers`.
        owner, weight, unchanged: of every micro-batch: who owns each image and each text, and `PackedBatch.weight` and
            `changes` where no text was cut.
        images: (samples, D) rows that are copied so far and not handed out yet, as they are stored, from micro-batch
            `first` on.
    """

    size: int
    found: _Found
    columns: list[list[Any]]
    targets: dict[str, Tensor] | list[Any]
    hashes: list[int]
    numbers: Tensor
    owner: Tensor
    weight: Tensor
    unchanged: Tensor
    images: Tensor
    first: int = 0


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
        self.source, self.epoch_key, self._fields = source, epoch_key, frozenset(source.fields)
        self.columns = Columns(reader)
        self._start()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_generator")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        collate = self.source.collate_targets if self.source.collates_by_row else None
        self._memory, self._generator = Memory(int(self.columns.firsts[-1]), collate), torch.Generator()

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
        found = self._found(epoch, shards, samples) if len(slots) else None
        if found is None:
            return None
        images = self._rows(found, slice(None))
        owner, keys_hash = slots, None
        if found.read is None:
            memory, rows = self._memory, found.rows
            (names, records, texts, raw), targets = memory.columns(rows), memory.targets_of(rows)
            keys_hash = int(memory.hashes[rows].sum())  # mod 2^64, as the numbers are
        else:
            names, records = [one.sample_id for one in found.read], [one.record for one in found.read]
            texts = [text for one in found.read for text in one.texts]
            targets = [target for one in found.read for target in one.targets]
            owner, raw = np.repeat(slots, [len(one.texts) for one in found.read]), list(map(raw_of, texts))
        weight = torch.ones(size)
        if len(slots) < size:
            names, records, weight = _padded(slots, size, names, records)
        owners = torch.from_numpy(slots), torch.from_numpy(owner)
        batch = self._packed(images, names, records, weight, *owners, texts, targets, raw)
        batch.keys_hash = keys_hash
        return batch

    def ahead(self, epoch: int, shards: np.ndarray, samples: np.ndarray, size: int) -> Ahead | None:
        """Several micro-batches of `size` samples each, one after the other, for `batch`.

        Returns:
            None where some sample has anything unusual, so that `make` has to make each.

        Raises:
            BadInput: if a shard is missing, or has changed.
        """
        found = self._found(epoch, shards, samples, plain_only=True)
        if found is None:
            return None
        memory, rows = self._memory, found.rows
        hashes = memory.hashes[rows]
        numbers = torch.from_numpy((hashes >> np.uint64(1)).astype(np.int64))
        return Ahead(
            size=size,
            found=found,
            columns=memory.columns(rows),
            targets=memory.targets_of(rows),
            hashes=hashes.reshape(-1, size).sum(1).tolist(),
            numbers=numbers,
            owner=torch.arange(size),
            weight=torch.ones(size),
            unchanged=torch.zeros(size, 3, dtype=torch.int64),
            images=torch.empty(0, found.kind[2]),
        )

    def batch(self, ahead: Ahead, number: int) -> PackedBatch:
        """One of the micro-batches of `ahead`; as `make` makes it. Raises BadInput if a shard is missing, or has
        changed."""
        size, owner = ahead.size, ahead.owner
        first = (number - ahead.first) * size
        if not 0 <= first < ahead.images.shape[0]:
            together = max(1, READ // (size * ahead.found.kind[0].itemsize * ahead.found.kind[2]))
            part = slice(number * size, (number + together) * size)
            self.columns.shards(_present(ahead.found.shards[part]))
            ahead.images, ahead.first, first = self._rows(ahead.found, part), number, 0
        part, targets = slice(number * size, (number + 1) * size), ahead.targets
        mine = {k: v[part] for k, v in targets.items()} if isinstance(targets, dict) else targets[part]
        names, records, texts, raw = (column[part] for column in ahead.columns)
        images = ahead.images[first : first + size]
        batch = self._packed(images, names, records, ahead.weight, owner, owner, texts, mine, raw, ahead.unchanged)
        batch.keys_hash, batch.id_numbers = ahead.hashes[number], ahead.numbers[part]
        batch.text_weight = batch.weight  # each slot is filled, and has one text
        if (loss_weight := self.source.loss_weight) is not None:
            changed = [0, 0, 0] if batch.changes is ahead.unchanged else batch.changed_texts()
            batch.counts = Counts(loss_weight(batch), size, batch.keys_hash, changed)
        return batch

    def _rows(self, found: _Found, part: slice) -> Tensor:
        """(S, D) rows of features, as they are stored."""
        dtype, _, width = found.kind
        return torch.from_numpy(self.columns.rows(found.shards[part], found.addresses[part], dtype, width))

    def _found(self, epoch: int, shards: np.ndarray, samples: np.ndarray, plain_only: bool = False) -> _Found | None:
        """Where samples are; None if one has to be read alone, or with `plain_only` is not plain."""
        columns = self.columns.shards(_present(shards))
        kind = next(iter(columns.values())).kind
        numbers, memory = self.columns.firsts[shards] + samples, self._memory
        if not self.columns.good[numbers].all() or any(c.kind != kind for c in columns.values()):
            return None
        key = self.epoch_key(epoch)
        try:
            new = memory.fitting(numbers, self.columns.read_bytes)
            for first in range(0, len(new), TOGETHER):
                some = new[first : first + TOGETHER]
                self._remember(key, kind, shards[some], numbers[some])
            rows = memory.place[numbers]
            plain = bool(memory.plain[rows].all())
            if plain_only and not plain:
                return None
            read = [] if plain else [self._read(key, kind, shards[[i]], numbers[[i]]) for i in range(len(numbers))]
        except BadSample:
            return None
        keys = memory.keys[rows] if plain else np.array([order.key_of(r.sample_id) for r in read], np.uint64)
        views = np.zeros(len(numbers), np.int64)
        views[:] = self.source.image_transform.row(kind[1], order.combined_many(key, keys))
        if not 0 <= views.min() <= views.max() < kind[1]:
            raise IndexError(f"the image transform takes row {views.max()} or {views.min()} of {kind[1]}")
        addresses = self.columns.address[numbers] + views * (kind[0].itemsize * kind[2])
        return _Found(shards, addresses, kind, rows, None if plain else read)

    def close(self) -> None:
        """Close the files."""
        self.columns.close()

    def _remember(
        self, epoch_key: int, kind: tuple[np.dtype, int, int], shards: np.ndarray, numbers: np.ndarray
    ) -> None:
        """Read samples for the first time. Raises BadSample if one cannot be used."""
        names, records = self._ids(numbers), self._records(kind, shards, numbers)
        # Whether the task draws at random is found out for all together; if it does, each has its own seed.
        before = _state(self._generator.manual_seed(0))
        with one_sample():
            texts, targets = zip(*[self.source.read(record, self._generator) for record in records], strict=True)
        if _state(self._generator) != before:
            pairs = zip(names, records, strict=True)
            self._memory.add(numbers, [self._drawn(epoch_key, *pair, find_out=True) for pair in pairs])
        elif {1} == set(map(len, texts)) == set(map(len, targets)):
            texts = with_images(list(chain.from_iterable(texts)), [None])
            self._memory.add_plain(numbers, names, records, texts, list(chain.from_iterable(targets)))
        else:
            made = zip(names, records, texts, targets, strict=True)
            self._memory.add(numbers, [_made(*parts, fixed=True) for parts in made])
        self._memory.bytes += int(self.columns.read_bytes[numbers].sum())

    def _read(self, epoch_key: int, kind: tuple[np.dtype, int, int], shard: np.ndarray, number: np.ndarray) -> Read:
        """Texts and targets of one sample, also of one that there is no room for. Raises BadSample.

        Args:
            shard, number: (1,) of each.
        """
        known = self._memory.read(int(number[0]))
        if known is not None:
            return known if known.fixed else self._drawn(epoch_key, known.sample_id, known.record)
        return self._drawn(epoch_key, self._ids(number)[0], self._records(kind, shard, number)[0])

    def _drawn(self, epoch_key: int, sample_id: str, record: dict[str, Any], find_out: bool = False) -> Read:
        """What the task reads of a record with the sample's own seed; with `find_out`, whether it draws at random.
        Raises BadSample."""
        self._generator.manual_seed(order.combined(epoch_key, order.key_of(sample_id)))
        before = _state(self._generator) if find_out else b""
        with one_sample():
            one = _made(sample_id, record, *self.source.read(record, self._generator), fixed=False)
        one.fixed = find_out and _state(self._generator) == before
        return one

    def _ids(self, numbers: np.ndarray) -> list[str]:
        """Ids of samples by their numbers in the split."""
        return sample_keys(self.columns.reader.split, numbers.tolist(), f"{self.source.manifest.name}/")

    def _records(
        self, kind: tuple[np.dtype, int, int], shards: np.ndarray, numbers: np.ndarray
    ) -> list[dict[str, Any]]:
        """The json of samples with the features of their captions under `text`. Raises BadSample, also for image
        features that are not finite."""
        dtype, rows, width = kind
        features = self.columns.rows(shards, self.columns.address[numbers], dtype, rows * width)
        check_finite(features)
        with one_sample():
            records = json_objects(self.columns.records(shards, numbers))
            for record, captions in zip(records, self.columns.texts(shards, numbers), strict=False):
                if captions is not None:
                    check_finite(captions)
                    record["text"] = torch.from_numpy(np.array(captions))  # a copy, since the file may be closed
            if not all(self._fields <= record.keys() for record in records):
                raise BadSample("field")
            for record, shown in zip(records, features, strict=True) if self.source.identify else ():
                record.setdefault(PICTURE, content_id([shown.tobytes()]))
        return records

    def _packed(
        self, images: Tensor, names: list[str], records: list[dict[str, Any]], weight: Tensor, image_owner: Tensor,
        text_owner: Tensor, texts: list[Any], targets: dict[str, Tensor] | list[Any], raw: list[Any],
        unchanged: Tensor | None = None,
    ) -> PackedBatch:  # fmt: skip
        """The same as `data.batch.pack` of these samples. Later batches share the records, and those of one `Ahead`
        its tensors: do not change them."""
        source = self.source
        collated = source.collate_texts(texts) if texts else {}
        if isinstance(targets, list):
            targets = source.collate_targets(targets) if targets else {}
        counted = unchanged is None or isinstance(collated, CollatedTexts)
        return PackedBatch(
            sample_id=names,
            weight=weight,
            images=source.collate_images(images),
            image_owner=image_owner,
            texts=dict(collated),
            text_owner=text_owner,
            targets=targets,
            records=records,
            raw_texts=raw,
            bad=[],
            changes=changes_of(collated, len(texts)) if counted else unchanged,
        )


def _padded(
    slots: np.ndarray, size: int, names: list[str], records: list[dict[str, Any]]
) -> tuple[list[str], list[dict[str, Any]], Tensor]:
    """Ids, records and weights of all slots, of which only some hold a sample."""
    sample_id, kept, weight = [""] * size, [{} for _ in range(size)], torch.zeros(size)
    for slot, name, record in zip(slots.tolist(), names, records, strict=True):
        sample_id[slot], kept[slot] = name, record
    weight[torch.from_numpy(slots)] = 1.0
    return sample_id, kept, weight


def _present(shards: np.ndarray) -> list[int]:
    """The numbers of the shards that occur, in order."""
    return np.flatnonzero(np.bincount(shards)).tolist()


def _made(sample_id: str, record: dict[str, Any], texts: list[Any], targets: list[Any], fixed: bool) -> Read:
    """Raises BadSample if there is not one target for each text, or a text names another number of images than one."""
    if len(texts) != len(targets):
        raise BadSample("type")
    return Read(sample_id, record, with_images(texts, [None]), targets, fixed)


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
