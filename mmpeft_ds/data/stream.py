"""Streams of packed batches from prepared data sets: the same global batches for any number of ranks and workers.

The order is a pure function (see order.py). So a resume starts at its step without reading anything before it, and a
worker needs only the slots and the step of the batch to make.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import PackedBatch, Sample, as_frames, check_images, pack, with_images
from mmpeft_ds.data.decode import picture_reader
from mmpeft_ds.data.feature_batches import FeatureBatches
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoredImage, StoreSpec, shard_number
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.packing import REFUSALS, refusal, refused, spread
from mmpeft_ds.data.parsing import npy_array, one_sample, size_in_memory
from mmpeft_ds.data.shards import ShardReader, Stamp, check_bytes, image_names, members, record_of
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.data.token_plan import Lengths, costs_of_ranks, homes_of, micro_batches, slowest
from mmpeft_ds.data.transform import apply, hooks_of
from mmpeft_ds.data.video import Times, Video, stacked, times_of
from mmpeft_ds.data.workers import WorkerPool
from mmpeft_ds.errors import BadInput, BadSample

log = logging.getLogger(__name__)
PLANNED = 256  # plans of steps that are kept, more than workers prepare ahead


@dataclass
class StreamSource:
    """One split of a data set, and the functions that read its samples. With workers, these must pickle.

    Attributes:
        manifest: of the data set; sample ids are `manifest.name/key`.
        split: of the data set.
        read: (record, torch.Generator) -> texts and one target per text; raises BadSample.
        image_transform: (uint8 (3, H, W), torch.Generator) -> what `collate_images` takes; a plain function, or a
            `data.transform.ImageTransform`. Where it takes features it gets the sample's array, one image, or the
            arrays along its first of three dimensions.
        collate_images, collate_texts, collate_targets: non-empty flat list -> tensors, see `data.batch.pack`.
        fields: json fields that every record must have.
        weight: relative share of the steps.
        subset: the samples to use; None: all of the split.
        video_transform, collate_videos: the same for videos, from a `data.video.Video` on; None: frames are read as
            images.
        most_images: of a sample, 0 = any number.
        collate_apart: takes the place of `collate_images` where values of images are kept (`Stream.keep_frozen`).
        stamps: of all shards when the run began, see `data.shards.stamp`; empty: not known.
        identify: give each record the identity of its images (of its stored features, where it has them) under
            `PICTURE`, unless it brings one.
    """

    manifest: Manifest
    split: str
    read: Callable[[dict[str, Any], torch.Generator], tuple[list[str], list[Any]]]
    image_transform: Callable[[Tensor, torch.Generator], Any]
    collate_images: Callable[[list[Any]], dict[str, Tensor]]
    collate_texts: Callable[[list[str]], dict[str, Tensor]]
    collate_targets: Callable[[list[Any]], dict[str, Tensor]]
    fields: Sequence[str] = ()
    weight: float = 1.0
    subset: Subset | None = None
    most_images: int = 0
    identify: bool = False
    stamps: Sequence[Stamp] = ()
    collate_apart: Callable[[list[Any]], dict[str, Tensor]] | None = None
    video_transform: Callable[[Video], Any] | None = None
    collate_videos: Callable[[list[Any]], dict[str, Tensor]] | None = None

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.manifest.samples(self.split) if self.subset is None else len(self.subset)


@dataclass
class Step:
    """The batches of one rank for one optimizer step.

    Attributes:
        source: index of the source (so of the task).
        step: step of the epoch.
        micro: one batch per accumulation step, as many on every rank. They have equally many slots, of which some may
            hold no sample, or, where micro-batches are planned by tokens, whatever has room.
        imbalance: planned cost of the slowest rank over that of the median one; None where nothing was planned.
    """

    source: int
    step: int
    micro: list[PackedBatch] = field(default_factory=list)
    imbalance: float | None = None


@dataclass(frozen=True)
class _Request:
    """One micro-batch: slots of a visit; None is padding. `padding_free`: see `PackedBatch`. `frozen`: where values of
    images are stored, None: images are only read."""

    visit: order.Visit
    slots: tuple[int | None, ...]
    padding_free: bool = False
    frozen: StoreSpec | None = None


class Stream:
    """The epochs of one rank.

    Args:
        sources: at least one; each step takes all its slots from one of them.
        options: `global_batch` slots per step, workers, shuffling, limits.
        rank, world_size: this rank; the global batch does not depend on them.
        accumulation: micro-batches per step.
        seed: of order, augmentation and choices.
        train: shuffle and follow `last_batch`; otherwise take every sample exactly once, in the same order and with
            the random choices of epoch 0 in every epoch.
        coupled: predictions of a sample depend on the others of its batch, see `options.evaluation_order`.
        pin_memory: put batches into pinned memory, from which a GPU copies asynchronously.
        lengths: of each source. Micro-batches are then planned by them, of at most `options.pack` tokens, and read
            without padding; `accumulation` is not read.

    Raises:
        BadInput: no source, an unknown split, a `pipe:` URL that is not allowed, or an epoch without a step.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        options: DataOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        train: bool = True,
        coupled: bool = False,
        pin_memory: bool = False,
        lengths: Sequence[Lengths] = (),
    ):
        if not sources:
            raise BadInput("data.sources: empty. Name at least one prepared data set.")
        last_batch = options.last_batch if train else "pad"
        self.slots = options.global_batch
        self.micro_slots = order.micro_slots(self.slots, rank, world_size, accumulation)
        self.sizes = [s.samples for s in sources]
        steps = [order.steps_of(n, self.slots, last_batch) for n in self.sizes]
        for source, n, count in zip(sources, self.sizes, steps, strict=True):
            if count == 0:
                raise BadInput(
                    f"{source.manifest.dir}: split {source.split!r} has {n} samples, fewer than data.global_batch "
                    f"{self.slots}. Use a smaller batch, or data.last_batch: pad."
                )
        self.mix = order.Mix(steps, [s.weight if train else 1.0 for s in sources], seed)
        self.loader = _Loader(sources, options, seed, train, coupled)
        self.lengths, self.budget, self.rank, self.world_size = lengths, options.pack, rank, world_size
        self._planned: dict[order.Visit, tuple[list[list[int | None]], float]] = {}
        self._frozen: StoreSpec | None = None
        self._pool = WorkerPool(self.loader, options.workers, options.prefetch, pin_memory)

    @property
    def num_samples(self) -> int:
        """Samples of all sources together, on all ranks."""
        return sum(self.sizes)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of an epoch, equal on all ranks."""
        return self.mix.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Step]:
        """Steps of an epoch from `start_step` on; nothing before it is read.

        Only one epoch of a stream can be open: starting another ends the earlier one.

        Raises:
            BadInput: if a shard is missing or unreachable.
        """
        made = self._pool.run(self._requests(epoch, start_step))
        for step in range(start_step, self.mix.steps):
            visit = self.mix.at(epoch, step)
            batches = [next(made) for _ in self._micro_slots(visit)]
            yield Step(visit.source, step, batches, self._plan_of(visit)[1] if self.lengths else None)

    def keep_frozen(self, spec: StoreSpec | None) -> None:
        """From the next epoch on do not decode images whose values are stored, and say of the others where they
        belong."""
        self._frozen = spec

    def wait_for_workers(self) -> None:
        """Return when all workers run. It is never needed: until then this process makes the batches."""
        self._pool.wait()

    def close(self) -> None:
        """End the workers; the stream cannot be used afterwards."""
        self._pool.close()
        self.loader.close()

    def _requests(self, epoch: int, start_step: int) -> Iterator[_Request]:
        for step in range(start_step, self.mix.steps):
            visit = self.mix.at(epoch, step)
            for slots in self._micro_slots(visit):
                yield _Request(visit, tuple(slots), bool(self.lengths), self._frozen)

    def micro_steps(self, epoch: int, step: int) -> int:
        """Micro-batches of each rank at a step."""
        return len(self._micro_slots(self.mix.at(epoch, step)))

    def plan(self, visit: order.Visit) -> tuple[list[list[list[int]]], float]:
        """Slots of each micro-batch, [micro-step][rank], where they are planned by tokens, and the cost of the slowest
        rank over that of the median one."""
        numbers = self.loader.numbers(visit)
        filled = np.flatnonzero(numbers >= 0)
        tokens, costs = (
            values[numbers[filled]].tolist()
            for values in (self.lengths[visit.source].tokens, self.lengths[visit.source].costs)
        )
        homes = homes_of(filled, self.slots, self.world_size)
        planned = micro_batches(tokens, costs, self.budget, self.world_size, homes)
        slots = [[filled[batch].tolist() for batch in step] for step in planned]
        return slots, slowest(costs_of_ranks(planned, costs))

    def _micro_slots(self, visit: order.Visit) -> list[list[int | None]]:
        """Slots of this rank's micro-batches at a visit."""
        return self._plan_of(visit)[0] if self.lengths else self.micro_slots

    def _plan_of(self, visit: order.Visit) -> tuple[list[list[int | None]], float]:
        """Slots of this rank's micro-batches, and the imbalance of all ranks."""
        if visit not in self._planned:  # asked for twice: when it is requested, and when it is handed out
            planned, imbalance = self.plan(visit)
            self._planned[visit] = [step[self.rank] or [None] for step in planned], imbalance
            while len(self._planned) > PLANNED:
                self._planned.pop(next(iter(self._planned)))
        return self._planned[visit]


class _Loader:
    """Makes the micro-batch of a request, in any process. Its caches never change the result."""

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
        self._frozen: StoreSpec | None = None
        self._store: FrozenStore | None = None
        self.gathers = [
            FeatureBatches(s, reader, self._epoch_key) if FeatureBatches.possible(s, reader) else None
            for s, reader in zip(sources, self.readers, strict=True)
        ]

    def __call__(self, request: _Request) -> PackedBatch:
        visit = request.visit
        epoch = visit.epoch if self.train else 0
        if request.frozen != self._frozen:
            self._frozen = request.frozen
            self._store = FrozenStore(request.frozen) if request.frozen and request.frozen.path else None
        places = self._order(visit.source, epoch)
        if self.gathers[visit.source] is not None:
            gathered = self._gathered(request, epoch, places)
            if gathered is not None:
                return gathered
        positions = [
            None if slot is None else order.position_of(len(places), self.options.global_batch, slot, visit.step)
            for slot in request.slots
        ]
        wanted = [self._place(visit.source, *places[p]) for p in positions if p is not None]
        pieces = iter(zip(wanted, self.readers[visit.source].read(wanted), strict=True))
        samples = [Sample() if p is None else self._sample(visit.source, epoch, *next(pieces)) for p in positions]
        shards = iter([self.readers[visit.source].shards[shard].file for shard, _ in wanted])
        batch = self._packed(visit.source, samples, ["" if p is None else next(shards) for p in positions])
        batch.padding_free = request.padding_free
        return batch

    def numbers(self, visit: order.Visit) -> np.ndarray:
        """(G,) the sample of each slot at a visit, as its number among all of its source, -1 for an empty slot."""
        places = self._order(visit.source, visit.epoch if self.train else 0)
        slots = np.arange(self.options.global_batch)
        numbers = order.positions_of(len(places), self.options.global_batch, slots, visit.step)
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
            reader = self.readers[number]
            wanted = [self._place(number, *place) for place in spread(self._sizes(number))]
            pieces = zip(wanted, reader.read(wanted), strict=True)
            samples = [self._sample(number, 0, place, piece) for place, piece in pieces]
            self._jurors[number] = [sample for sample in samples if sample.bad is None]
        return self._jurors[number]

    def _gathered(self, request: _Request, epoch: int, places: order.EpochOrder) -> PackedBatch | None:
        """The micro-batch gathered as a whole, for feature shards; None if it must be read sample by sample."""
        source, size = request.visit.source, len(request.slots)
        own = np.array([-1 if slot is None else slot for slot in request.slots], np.int64)
        positions = order.positions_of(len(places), self.options.global_batch, own, request.visit.step)
        filled = np.flatnonzero((own >= 0) & (positions >= 0))
        shards, samples = places.many(positions[filled])
        if (chosen := self.places[source]) is not None:
            starts = np.cumsum([0, *map(len, chosen)])
            samples = np.concatenate(chosen)[starts[shards] + samples]
        try:
            return self.gathers[source].make(epoch, shards, samples, filled, size)
        except BadInput:  # a shard is gone, or has changed
            raise
        except REFUSALS:  # by a function that collates; sample by sample it will be seen of which
            return None

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        for gather in self.gathers:
            if gather is not None:
                gather.close()
        if self._store is not None:
            self._store.close()

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

    def _sample(self, source: int, epoch: int, place: tuple[int, int], piece: bytes | BadSample) -> Sample:
        """One slot; a sample with any fault becomes a slot of weight 0."""
        name, shard = self.sources[source].manifest.name, self.readers[source].shards[place[0]].file
        key = f"#{place[1]}"  # for samples that are too damaged to read their key
        try:
            if isinstance(piece, BadSample):
                raise piece
            with one_sample():
                key, parts = members(piece)
                self.readers[source].check_key(*place, key)
                place = self._frozen_place(source, *place)
                return self._good_sample(self.sources[source], epoch, f"{name}/{key}", parts, place)
        except BadSample as bad:
            log.warning("bad sample %s in %s: %s", key, shard, bad)
            return Sample(sample_id=f"{name}/{key}", bad=(bad.kind, shard, key))

    def _frozen_place(self, source: int, shard: int, number: int) -> Place | None:
        """The identity of a sample in a store of values; None if nothing is stored."""
        if self._frozen is None:
            return None
        info = self.readers[source].shards[shard]
        return Place(shard_number(info.sha256), info.samples, number)

    def _good_sample(
        self, source: StreamSource, epoch: int, sample_id: str, parts: dict[str, bytes], place: Place | None = None
    ) -> Sample:
        seed = order.combined(self._epoch_key(epoch), order.key_of(sample_id))
        generator = torch.Generator().manual_seed(seed)
        record = _record(parts, source.fields)
        if source.identify:
            identify(record, parts)
        try:
            texts, targets = source.read(record, generator)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            # The record has another structure than the task expects; tasks need not check every type.
            raise BadSample("type", f"{type(error).__name__}: {error}") from error
        if len(texts) != len(targets):
            raise BadSample("type", f"{len(texts)} texts but {len(targets)} targets")
        sample = Sample(sample_id, 1.0, targets=targets, record=record, place=place)
        videos = times_of(record, len(image_names(parts))) if "features" not in record else []
        held, as_images = 0, source.video_transform is None
        stored = None if place is None or self._store is None else self._store.find(place)
        if stored is not None and (as_images or not videos):
            check_images(len(stored), source.most_images)
            sample.images = [StoredImage(spelling) for spelling in stored]
            sample.texts = with_images(as_frames(texts, videos), sample.images)
            return sample
        for medium in self._media(source, parts, record, [] if as_images else videos):
            if isinstance(medium, Video):
                sample.videos.append(apply(source.video_transform, medium))
                sample.times.append(medium.times.of_frames)
                held += size_in_memory(sample.videos[-1])
            else:
                sample.images.append(apply(source.image_transform, medium, generator))
                held += size_in_memory(sample.images[-1])
            check_bytes(held, self.options.max_sample_bytes)
        check_images(len(sample.images), source.most_images)
        texts = as_frames(texts, videos) if as_images else texts
        sample.texts = with_images(texts, sample.images, sample.videos)
        return sample

    def _media(
        self, source: StreamSource, parts: dict[str, bytes], record: dict[str, Any], videos: list[Times]
    ) -> Iterator[Tensor | Video]:
        """Decoded images and videos of a sample, or its stored features, which are taken out of the record."""
        transform = hooks_of(source.image_transform)
        if transform.takes_features:
            features = record.pop("features", None)
            if features is not None:
                _check_width(features, source.manifest)
                yield from features if features.dim() > 2 else (features,)
            return
        min_size = transform.min_size if self.options.decode == "scaled" else None
        read, names = picture_reader(self.options), image_names(parts)
        images = len(names) - sum(len(video.of_frames) for video in videos)
        yield from (read(parts[name], min_size=min_size) for name in names[:images])
        frames = (read(parts[name]) for name in names[images:])
        yield from (stacked(list(islice(frames, len(video.of_frames))), video) for video in videos)


def _record(parts: dict[str, bytes], fields: Sequence[str]) -> dict[str, Any]:
    """The JSON of a sample with its arrays. Raises BadSample."""
    record = with_arrays(record_of(parts), parts)
    for name in fields:
        if name not in record:
            raise BadSample("field", f"no field {name!r}")
    return record


def _check_width(features: Tensor, manifest: Manifest) -> None:
    """Raise BadSample for stored features that the towers of the data set did not make."""
    width = manifest.towers.get("image_width")
    if width is not None and features.shape[-1:] != (width,):
        raise BadSample("features", f"shape {tuple(features.shape)}, where the towers give {width:,} numbers")


def with_arrays(record: dict[str, Any], parts: dict[str, bytes]) -> dict[str, Any]:
    """The record with the array `KEY.npy` under `features`, and `KEY.NAME.npy` under `NAME`. Raises BadSample."""
    for name, data in parts.items():
        if name == "npy" or name.endswith(".npy"):
            record[name.removesuffix("npy").rstrip(".") or "features"] = torch.from_numpy(npy_array(data))
    return record


def identify(record: dict[str, Any], parts: dict[str, bytes]) -> None:
    """Give the record of a sample whose members are `parts` the identity of what a model sees of it."""
    features = record.get("features")
    contents = [parts[name] for name in image_names(parts)] if features is None else [features.numpy().tobytes()]
    if contents:
        record.setdefault(PICTURE, content_id(contents))
