"""Micro-batches from feature shards, gathered as a whole; the same as when they are read sample by sample.

Records are parsed once and kept, as are the texts and targets that a task reads from them without drawing at random. A
micro-batch with anything unusual (a bad sample, several images, a record that cannot be used) is left to the stream,
which reads it sample by sample.
"""

# S slots of a micro-batch, D width, V augmented passes

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import Counts, Described, PackedBatch, changes_of, hash_id, with_images
from mmpeft_ds.data.feature_columns import Columns, ShardColumns, reachable
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.parsing import check_finite, json_object, one_sample
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.errors import BadSample

# Samples that are read for the first time together: few, so that what is made on the way is gone before Python looks
# for garbage a second time.
TOGETHER = 96
READ = 2**20  # bytes of rows that are copied at a time, or of one micro-batch: they stay in a core's cache
# Samples of a source whose texts and targets are kept, as long as their records and features of captions are not more
# than so many bytes in their shard; as objects of Python they take a few times that.
REMEMBERED = 2**16
REMEMBERED_BYTES = 2**27


@dataclass(slots=True)
class _Read:
    """Texts and targets of a record; `fixed`: read without drawing at random, so the same in every epoch."""

    sample_id: str
    record: dict[str, Any]
    texts: list[Any]
    targets: list[Any]
    fixed: bool


@dataclass(slots=True)
class _Found:
    """Where samples are.

    Attributes:
        shards, addresses: (S,) of each, see `Columns.rows`.
        kind: see `ShardColumns.kind`.
        rows: (S,) of `_Memory`.
        read: what was read of samples that are not all plain; None: all are.
    """

    shards: np.ndarray
    addresses: np.ndarray
    kind: tuple[np.dtype, int, int]
    rows: np.ndarray
    read: list[_Read] | None


@dataclass(slots=True)
class Ahead:
    """Samples of several micro-batches, found together; all plain, see `_Memory`.

    Attributes:
        size: slots of each micro-batch, all filled.
        found: where their rows are.
        columns: names, records, texts and raw texts of all samples.
        targets: collated, of all samples, or as the task reads them.
        hashes: of each micro-batch, `PackedBatch.keys_hash`.
        numbers: of all samples, `PackedBatch.id_numbers`.
        images: (samples, D) rows that are copied so far and not handed out yet, as they are stored, from micro-batch
            `first` on.
    """

    size: int
    found: _Found
    columns: list[list[Any]]
    targets: dict[str, Tensor] | list[Any]
    hashes: list[int]
    numbers: Tensor
    images: Tensor
    first: int = 0


class _Memory:
    """Samples of a split that were read before, in columns, so that many are looked up at once.

    Attributes:
        bytes: of what was read of those, in their shards.
        place: (n,) int32 row of each sample in the columns; row 0 stands for all samples not read yet.
        keys, hashes: uint64, `order.key_of` and `batch.hash_id` of the sample ids.
        plain: bool: fixed, with exactly one text; `names`, `records`, `texts`, `raw` and `targets` are its parts. Of
            these there is no `_Read`: its lists are objects that Python looks through for garbage again and again.
        collated: rows of the collated targets of those, where `collate` is given.
        others: `_Read` of those that are not plain, else None.
    """

    COLUMNS = ("names", "records", "texts", "raw")

    def __init__(self, n: int, collate: Callable[[list[Any]], dict[str, Tensor]] | None):
        rows = 1 + min(n, REMEMBERED)
        self.collate, self.collated = collate, dict[str, Tensor]()
        self.place, self.count, self.bytes = np.zeros(n, np.int32), 0, 0
        self.keys, self.hashes = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
        self.plain, self.others = np.zeros(rows, bool), np.empty(rows, object)
        for name in (*self.COLUMNS, "targets"):
            setattr(self, name, np.empty(rows, object))

    @property
    def room(self) -> int:
        """Samples that can be added, whatever their size."""
        return len(self.others) - 1 - self.count

    def read(self, number: int) -> _Read | None:
        """What was read of a sample; None if it was not."""
        row = int(self.place[number])
        if not self.plain[row]:
            return self.others[row]
        return _Read(self.names[row], self.records[row], [self.texts[row]], [self.targets[row]], True)

    def add(self, numbers: np.ndarray, read: list[_Read]) -> None:
        """Add samples that are not there yet, for which there is room."""
        plain = [one.fixed and len(one.texts) == 1 for one in read]
        single = [one for one, is_plain in zip(read, plain, strict=True) if is_plain]
        collated = self.collate([one.targets[0] for one in single]) if self.collate and single else {}
        rows = slice(self.count + 1, self.count + 1 + len(read))
        self.count += len(read)
        self.place[numbers] = np.arange(rows.start, rows.stop)
        self.keys[rows] = np.array([order.key_of(one.sample_id) for one in read], np.uint64)
        self.hashes[rows] = np.array([hash_id(one.sample_id) for one in read], np.uint64)
        self.others[rows] = _objects([None if is_plain else one for is_plain, one in zip(plain, read, strict=True)])
        if not single:
            return
        at = rows.start + np.flatnonzero(plain)
        self.plain[at] = True
        parts = ((one.sample_id, one.record, one.texts[0], _raw(one.texts[0]), one.targets[0]) for one in single)
        for name, column in zip((*self.COLUMNS, "targets"), zip(*parts, strict=True), strict=True):
            getattr(self, name)[at] = _objects(column)
        for name, tensor in collated.items():
            if name not in self.collated:
                self.collated[name] = tensor.new_zeros(len(self.others), *tensor.shape[1:])
            self.collated[name][torch.from_numpy(at)] = tensor

    def columns(self, rows: np.ndarray) -> list[list[Any]]:
        """COLUMNS of plain samples."""
        return [getattr(self, name)[rows].tolist() for name in self.COLUMNS]

    def targets_of(self, rows: np.ndarray) -> dict[str, Tensor] | list[Any]:
        """Those of plain samples: collated where they are, else as the task reads them."""
        if not self.collate:
            return self.targets[rows].tolist()
        chosen = torch.from_numpy(rows.astype(np.int64))
        return {name: tensor.index_select(0, chosen) for name, tensor in self.collated.items()}


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
        self._start()

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_generator")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        collate = self.source.collate_targets if self.source.collates_by_row else None
        self._memory, self._generator = _Memory(int(self.columns.firsts[-1]), collate), torch.Generator()

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
        if found.read is None:
            memory, rows = self._memory, found.rows
            names, records, texts, raw = memory.columns(rows)
            batch = self._packed(images, slots, size, names, records, slots, texts, memory.targets_of(rows), raw)
            batch.keys_hash = int(memory.hashes[rows].sum())  # mod 2^64, as the numbers are
            return batch
        texts = [text for one in found.read for text in one.texts]
        targets = [target for one in found.read for target in one.targets]
        names, records = [one.sample_id for one in found.read], [one.record for one in found.read]
        owner = np.repeat(slots, [len(one.texts) for one in found.read])
        return self._packed(images, slots, size, names, records, owner, texts, targets, [_raw(t) for t in texts])

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
        hashes, images = memory.hashes[rows], torch.empty(0, found.kind[2])
        sums, numbers = hashes.reshape(-1, size).sum(1).tolist(), (hashes >> np.uint64(1)).astype(np.int64)
        columns, targets = memory.columns(rows), memory.targets_of(rows)
        return Ahead(size, found, columns, targets, sums, torch.from_numpy(numbers), images)

    def batch(self, ahead: Ahead, number: int) -> PackedBatch:
        """One of the micro-batches of `ahead`; as `make` makes it. Raises BadInput if a shard is missing, or has
        changed."""
        size, slots = ahead.size, np.arange(ahead.size)
        first = (number - ahead.first) * size
        if not 0 <= first < len(ahead.images):
            together = max(1, READ // (size * ahead.found.kind[0].itemsize * ahead.found.kind[2]))
            part = slice(number * size, (number + together) * size)
            self.columns.shards(_present(ahead.found.shards[part]))
            ahead.images, ahead.first, first = self._rows(ahead.found, part), number, 0
        part, targets = slice(number * size, (number + 1) * size), ahead.targets
        mine = {k: v[part] for k, v in targets.items()} if isinstance(targets, dict) else targets[part]
        names, records, texts, raw = (column[part] for column in ahead.columns)
        images = ahead.images[first : first + size]
        batch = self._packed(images, slots, size, names, records, slots, texts, mine, raw)
        batch.keys_hash, batch.id_numbers = ahead.hashes[number], ahead.numbers[part]
        batch.text_weight = batch.weight  # each slot is filled, and has one text
        if (loss_weight := self.source.loss_weight) is not None:
            batch.counts = Counts(loss_weight(batch), size, batch.keys_hash, batch.changed_texts())
        return batch

    def _rows(self, found: _Found, part: slice) -> Tensor:
        """(S, D) rows of features, as they are stored."""
        dtype, _, width = found.kind
        return torch.from_numpy(self.columns.rows(found.addresses[part], dtype, width))

    def _found(self, epoch: int, shards: np.ndarray, samples: np.ndarray, plain_only: bool = False) -> _Found | None:
        """Where samples are; None if one has to be read alone, or with `plain_only` is not plain."""
        columns = self.columns.shards(_present(shards))
        kind = next(iter(columns.values())).kind
        numbers, memory = self.columns.firsts[shards] + samples, self._memory
        if not self.columns.good[numbers].all() or any(c.kind != kind for c in columns.values()):
            return None
        key = self.epoch_key(epoch)
        try:
            new = np.flatnonzero(memory.place[numbers] == 0)[: memory.room]
            sizes = memory.bytes + self.columns.read_bytes[numbers[new]].cumsum()
            new = new[sizes <= REMEMBERED_BYTES]
            for first in range(0, len(new), TOGETHER):
                some = new[first : first + TOGETHER]
                self._remember(key, columns, shards[some], samples[some], numbers[some])
            rows = memory.place[numbers]
            plain = bool(memory.plain[rows].all())
            if plain_only and not plain:
                return None
            pairs = [] if plain else zip(shards.tolist(), samples.tolist(), strict=True)
            read = [self._read(key, columns, *pair) for pair in pairs]
        except BadSample:
            return None
        keys = memory.keys[rows] if plain else np.array([order.key_of(r.sample_id) for r in read], np.uint64)
        views = np.zeros(len(numbers), np.int64)
        views[:] = self.source.image_transform.row(kind[1], order.combined_many(key, keys))
        addresses = self.columns.address[numbers] + views * (kind[0].itemsize * kind[2])
        return _Found(shards, addresses, kind, rows, None if plain else read)

    def close(self) -> None:
        """Close the files."""
        self.columns.close()

    def _remember(
        self,
        epoch_key: int,
        columns: dict[int, ShardColumns],
        shards: np.ndarray,
        samples: np.ndarray,
        numbers: np.ndarray,
    ) -> None:
        """Read samples for the first time. Raises BadSample if one cannot be used."""
        dtype, rows, width = next(iter(columns.values())).kind
        check_finite(self.columns.rows(self.columns.address[numbers], dtype, rows * width))
        pairs = list(zip(shards.tolist(), samples.tolist(), strict=True))
        # Whether the task draws at random is found out for all together; if it does, each has its own seed.
        before = _state(self._generator.manual_seed(0))
        with one_sample():
            read = [self._made(self._id(*pair), self._record(columns[pair[0]], pair[1]), True) for pair in pairs]
        if _state(self._generator) != before:
            read = [self._drawn(epoch_key, one.sample_id, one.record, find_out=True) for one in read]
        self._memory.add(numbers, read)
        self._memory.bytes += int(self.columns.read_bytes[numbers].sum())

    def _read(self, epoch_key: int, columns: dict[int, ShardColumns], shard: int, sample: int) -> _Read:
        """Texts and targets of one sample, also of one that there is no room for. Raises BadSample."""
        known = self._memory.read(self.columns.firsts[shard] + sample)
        if known is not None:
            return known if known.fixed else self._drawn(epoch_key, known.sample_id, known.record)
        columns[shard].check_finite(np.array([sample]))
        with one_sample():
            record = self._record(columns[shard], sample)
        return self._drawn(epoch_key, self._id(shard, sample), record)

    def _drawn(self, epoch_key: int, sample_id: str, record: dict[str, Any], find_out: bool = False) -> _Read:
        """What the task reads of a record with the sample's own seed; with `find_out`, whether it draws at random.
        Raises BadSample."""
        self._generator.manual_seed(order.combined(epoch_key, order.key_of(sample_id)))
        before = _state(self._generator) if find_out else b""
        with one_sample():
            one = self._made(sample_id, record, False)
        one.fixed = find_out and _state(self._generator) == before
        return one

    def _made(self, sample_id: str, record: dict[str, Any], fixed: bool) -> _Read:
        texts, targets = self.source.read(record, self._generator)
        if len(texts) != len(targets):
            raise BadSample("type")
        return _Read(sample_id, record, with_images(texts, [None]), targets, fixed)

    def _id(self, shard: int, sample: int) -> str:
        return f"{self.source.manifest.name}/{self.columns.key(shard, sample)}"

    def _record(self, columns: ShardColumns, sample: int) -> dict[str, Any]:
        """The json of a sample with the features of its captions under `text`. Raises BadSample."""
        record = json_object(columns.record(sample))
        if (captions := columns.text(sample)) is not None:
            check_finite(captions)
            record["text"] = torch.from_numpy(np.array(captions))  # a copy, since the file may be closed
        if any(name not in record for name in self.source.fields):
            raise BadSample("field")
        if self.source.identify:
            record.setdefault(PICTURE, content_id([columns.content(sample)]))
        return record

    def _packed(
        self, images: Tensor, slots: np.ndarray, size: int, names: list[str], records: list[dict[str, Any]],
        text_owner: np.ndarray, texts: list[Any], targets: dict[str, Tensor] | list[Any], raw: list[Any],
    ) -> PackedBatch:  # fmt: skip
        """The same as `data.batch.pack` of these samples. Later batches share the records: do not change them."""
        sample_id, kept, weight, source = names, records, torch.ones(size), self.source
        if len(slots) < size:
            sample_id, kept = [""] * size, [{} for _ in range(size)]
            for slot, name, record in zip(slots.tolist(), names, records, strict=True):
                sample_id[slot], kept[slot] = name, record
            weight = torch.zeros(size)
            weight[torch.from_numpy(slots)] = 1.0
        collated = source.collate_texts(texts) if texts else {}
        if isinstance(targets, list):
            targets = source.collate_targets(targets) if targets else {}
        return PackedBatch(
            sample_id=sample_id,
            weight=weight,
            images=source.collate_images(images),
            image_owner=torch.from_numpy(slots),
            texts=dict(collated),
            text_owner=torch.from_numpy(text_owner),
            targets=targets,
            records=kept,
            raw_texts=raw,
            bad=[],
            changes=changes_of(collated, len(texts)),
        )


def _present(shards: np.ndarray) -> list[int]:
    """The numbers of the shards that occur, in order."""
    return np.flatnonzero(np.bincount(shards)).tolist()


def _objects(values: Sequence[Any]) -> np.ndarray:
    """(n,) array of these very objects, also where they are lists."""
    return np.fromiter(values, object, len(values))


def _raw(text: Any) -> Any:
    return text.text if isinstance(text, Described) else text


def _state(generator: torch.Generator) -> bytes:
    return generator.get_state().numpy().tobytes()
