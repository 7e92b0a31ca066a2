"""The micro-batch of a request, made in any process: in a worker, or in the rank itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import PackedBatch, Sample, pack
from mmpeft_ds.data.decode_ahead import DecodeAhead, Opened
from mmpeft_ds.data.feature_ahead import Lookahead
from mmpeft_ds.data.feature_batches import FeatureBatches
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoreSpec, shard_number
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.packing import REFUSALS, refusal, refused, spread
from mmpeft_ds.data.parsing import one_sample
from mmpeft_ds.data.samples import image_reader, make_sample
from mmpeft_ds.data.shards import ShardReader, members
from mmpeft_ds.data.stream_source import StreamSource
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.errors import BadInput, BadSample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One micro-batch: slots of a visit; None is padding. `padding_free`: see `PackedBatch`. `frozen`: where values of
    images are stored, None: images are only read."""

    visit: order.Visit
    slots: tuple[int | None, ...]
    padding_free: bool = False
    frozen: StoreSpec | None = None


class Loader:
    """Makes the micro-batch of a request, in any process. Its caches never change the result.

    Attributes:
        slots: of a step: `data.global_batch`, or `data.evaluation_batch` where a rank evaluates whole steps.
    """

    def __init__(
        self, sources: Sequence[StreamSource], options: DataOptions, seed: int, train: bool, coupled: bool = False
    ):
        self.sources, self.options, self.seed, self.train = list(sources), options, seed, train
        chosen = options.evaluation_order
        self.shuffled_evaluation = not train and (chosen == "shuffled" or (chosen == "auto" and coupled))
        self.readers = [ShardReader.of(s.manifest, s.split, options, s.stamps) for s in sources]
        # Per source: shard -> the samples to use; None: all of every shard.
        self.places = [None if s.subset is None else s.subset.places(s.manifest) for s in sources]
        self._orders: dict[int, tuple[int, order.EpochOrder]] = {}
        self._jurors: dict[int, list[Sample]] = {}
        self._ahead: dict[int, DecodeAhead] = {}  # by threads
        self._frozen: StoreSpec | None = None
        self._store: FrozenStore | None = None
        self.gathers = [
            FeatureBatches(s, reader, self._epoch_key) if FeatureBatches.possible(s, reader) else None
            for s, reader in zip(sources, self.readers, strict=True)
        ]
        self.coming = [gather and Lookahead(gather) for gather in self.gathers]
        # Gathered batches cost little for each sample, and much for each batch.
        few = not train and not coupled and None in self.gathers
        self.slots = min(options.global_batch, options.evaluation_batch) if few else options.global_batch

    def __call__(self, request: Request) -> PackedBatch:
        visit = request.visit
        epoch = visit.epoch if self.train else 0
        if request.frozen != self._frozen:
            self._frozen = request.frozen
            self._store = FrozenStore(request.frozen) if request.frozen and request.frozen.path else None
        places = self._order(visit.source, epoch)
        if self.gathers[visit.source] is not None:
            gathered = self._gathered(request, epoch, places)
            if gathered is not None:
                return self._counted(visit.source, gathered)
        positions = [
            None if slot is None else order.position_of(len(places), self.slots, slot, visit.step)
            for slot in request.slots
        ]
        wanted = [self._place(visit.source, *places[p]) for p in positions if p is not None]
        made = self._samples(visit.source, epoch, wanted)
        samples = [Sample() if p is None else next(made) for p in positions]
        shards = iter([self.readers[visit.source].shards[shard].file for shard, _ in wanted])
        batch = self._packed(visit.source, samples, ["" if p is None else next(shards) for p in positions])
        batch.padding_free = request.padding_free
        return self._counted(visit.source, batch)

    def _counted(self, number: int, batch: PackedBatch) -> PackedBatch:
        """The batch, with `counts` where the source says what they are."""
        if batch.counts is None and (loss_weight := self.sources[number].loss_weight) is not None:
            batch.counts = batch.count(loss_weight)
        return batch

    def numbers(self, visit: order.Visit) -> np.ndarray:
        """(G,) the sample of each slot at a visit, as its number among all of its source, -1 for an empty slot."""
        places = self._order(visit.source, visit.epoch if self.train else 0)
        slots = np.arange(self.slots)
        numbers = order.positions_of(len(places), self.slots, slots, visit.step)
        filled = numbers >= 0
        shards, samples = places.many(numbers[filled])
        numbers[filled] = self._starts(visit.source)[shards] + samples
        return numbers

    def _starts(self, source: int) -> np.ndarray:
        """For each shard the number of used samples in the shards before it."""
        return np.cumsum([0, *self._sizes(source)])

    def _sizes(self, source: int) -> list[int]:
        """Samples that are used of each shard."""
        chosen = self.places[source]
        return [s.samples for s in self.readers[source].shards] if chosen is None else [len(rows) for rows in chosen]

    def _packed(self, number: int, samples: list[Sample], shards: list[str]) -> PackedBatch:
        """The batch; a sample that cannot be packed, alone or with the usual ones, is bad as one that cannot be read.

        Args:
            shards: file of each sample.
        """
        source = self.sources[number]
        apart = self._frozen is not None and source.collate_apart is not None
        collate_images = source.collate_apart if apart else source.collate_images

        def packed(samples: list[Sample]) -> PackedBatch:
            functions = (collate_images, source.collate_texts, source.collate_targets, source.collate_videos)
            return pack(samples, *functions)

        try:
            return packed(samples)
        except REFUSALS as error:
            bad = refused(samples, packed, lambda: self._usual(number))
            if bad is None:  # not the doing of a sample
                raise
            together = error
        changed = list(samples)
        for i in bad:
            reason = refusal(packed, samples[i]) or together
            kind = reason.kind if isinstance(reason, BadSample) else "collate"
            sample_id, words = samples[i].sample_id, " ".join(str(reason).split())[:200]
            log.warning("bad sample %s in %s: cannot be packed: %s", sample_id, shards[i], words)
            changed[i] = Sample(sample_id, bad=(kind, shards[i], sample_id.partition("/")[2]))
        return packed(changed)

    def _usual(self, number: int) -> list[Sample]:
        """Some samples of a source from all over its split, the same for every rank, worker and batch."""
        if number not in self._jurors:
            wanted = [self._place(number, *place) for place in spread(self._sizes(number))]
            self._jurors[number] = [sample for sample in self._samples(number, 0, wanted) if sample.bad is None]
        return self._jurors[number]

    def _gathered(self, request: Request, epoch: int, places: order.EpochOrder) -> PackedBatch | None:
        """The micro-batch gathered as a whole, for feature shards; None if it must be read sample by sample."""
        source, step, slots = request.visit.source, request.visit.step, request.slots

        def full(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            positions = order.positions_of(len(places), self.slots, np.array(slots, np.int64), steps[:, None])
            filled = (positions >= 0).all(1)
            positions = positions if filled.all() else positions[: filled.argmin()]
            return tuple(part.reshape(positions.shape) for part in self._found(source, places, positions.ravel()))

        try:
            if None not in slots:
                batch = self.coming[source].take(epoch, slots, step, full)
                if batch is not None:
                    return batch
            own = np.array([-1 if slot is None else slot for slot in slots], np.int64)
            positions = order.positions_of(len(places), self.slots, own, step)
            filled = np.flatnonzero((own >= 0) & (positions >= 0))
            found = self._found(source, places, positions[filled])
            return self.gathers[source].make(epoch, *found, filled, len(slots))
        except BadInput:  # a shard is gone, or has changed
            raise
        except REFUSALS:  # by a function that collates; sample by sample it will be seen of which
            return None

    def _found(self, source: int, places: order.EpochOrder, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and samples at positions of an epoch."""
        shards, samples = places.many(positions)
        if (chosen := self.places[source]) is not None:
            starts = np.cumsum([0, *map(len, chosen)])
            samples = np.concatenate(chosen)[starts[shards] + samples]
        return shards, samples

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        for gather in self.gathers:
            if gather is not None:
                gather.close()
        if self._store is not None:
            self._store.close()
        for ahead in self._ahead.values():
            ahead.close()

    def _epoch_key(self, epoch: int) -> int:
        """Key from which with that of a sample's id the seed of the sample's random choices is made."""
        return order.key_of(self.seed, "sample", epoch)

    def _order(self, source: int, epoch: int) -> order.EpochOrder:
        if self._orders.get(source, (None,))[0] != epoch:
            sizes = self._sizes(source)
            key, block = order.key_of(self.seed, "order", source, epoch), self.options.shuffle_block
            if self.shuffled_evaluation:
                # In one block, so that a split sorted by class is shuffled over all classes. The key depends on the
                # name of the data set, not on the recipe's seed, so that every method gets the same batches.
                data = self.sources[source]
                key = order.key_of("evaluation", self.options.evaluation_seed, data.manifest.name, data.split)
                block = sum(sizes)
            shuffle = self.train or self.shuffled_evaluation
            self._orders[source] = (epoch, order.EpochOrder(sizes, key, block, shuffle))
            self.readers[source].check_open()
        return self._orders[source][1]

    def _place(self, source: int, shard: int, number: int) -> tuple[int, int]:
        """(shard, sample) of number `number` among the samples of a shard that are used."""
        chosen = self.places[source]
        return shard, number if chosen is None else int(chosen[shard][number])

    def _samples(self, source: int, epoch: int, places: Sequence[tuple[int, int]]) -> Iterator[Sample]:
        """The samples at some places, in their order; one with any fault becomes a slot of weight 0."""
        pieces = self.readers[source].each(places)
        opened = (self._opened(source, place, piece) for place, piece in zip(places, pieces, strict=True))
        read, key = image_reader(self.sources[source], self.options), self._epoch_key(epoch)
        for place, (sample, image_of) in zip(places, self._decode_ahead(source).over(opened, read), strict=True):
            yield self._sample(source, key, place, sample, image_of)

    def _opened(self, source: int, place: tuple[int, int], piece: bytes | BadSample) -> Opened:
        key = f"#{place[1]}"  # for samples that are too damaged to read their key
        try:
            if isinstance(piece, BadSample):
                raise piece
            with one_sample():
                key, parts = members(piece)
                self.readers[source].check_key(*place, key)
                return Opened(key, parts)
        except BadSample as bad:
            return Opened(key, bad)

    def _sample(
        self, source: int, epoch_key: int, place: tuple[int, int], opened: Opened, image_of: Callable[[str], Tensor]
    ) -> Sample:
        sample_id = f"{self.sources[source].manifest.name}/{opened.key}"
        try:
            if isinstance(opened.parts, BadSample):
                raise opened.parts
            with one_sample():
                seed = order.combined(epoch_key, order.key_of(sample_id))
                given = (self.sources[source], self.options, sample_id, opened.parts, seed, image_of)
                return make_sample(*given, place=self._frozen_place(source, *place), store=self._store)
        except BadSample as bad:
            shard = self.readers[source].shards[place[0]].file
            log.warning("bad sample %s in %s: %s", opened.key, shard, bad)
            return Sample(sample_id=sample_id, bad=(bad.kind, shard, opened.key))

    def _decode_ahead(self, source: int) -> DecodeAhead:
        """What decodes ahead, in as many threads as this process has; in none where pixels may not be needed."""
        wanted = torch.get_num_threads() if get_worker_info() is None else self.options.worker_threads
        if self._store is not None or hooks_of(self.sources[source].image_transform).takes_features:
            wanted = 1
        if wanted not in self._ahead:
            self._ahead[wanted] = DecodeAhead(wanted)
        return self._ahead[wanted]

    def _frozen_place(self, source: int, shard: int, number: int) -> Place | None:
        """The identity of a sample in a store of values; None if nothing is stored."""
        if self._frozen is None:
            return None
        info = self.readers[source].shards[shard]
        return Place(shard_number(info.sha256), info.samples, number)
