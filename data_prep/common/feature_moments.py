"""Mean and deviation of a vision tower's features over the images of a split, for feature_stats.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data_prep.common.reading import parse_sample
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.decode import decode
from mmpeft_ds.data.frozen_store import Place, StoredImage, shard_number
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.packing import make_of_most, spread
from mmpeft_ds.data.shards import ShardReader
from mmpeft_ds.data.transform import apply
from mmpeft_ds.engine import frozen_images
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.progress import Progress
from mmpeft_ds.recipe import Recipe

log = logging.getLogger(__name__)

Read = Callable[[bytes], Tensor]  # bytes of a picture -> its pixels


class Moments:
    """Mean and variance per dimension of rows that come in batches, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows_ID: Tensor) -> None:
        """Merge a batch by the differences of the means, which does not cancel as a sum of squares would."""
        rows_ID = rows_ID.double().cpu()
        n = len(rows_ID)
        mean = rows_ID.mean(0)
        delta = mean - self.mean
        total = self.count + n
        self.squares = self.squares + ((rows_ID - mean) ** 2).sum(0) + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        """Standard deviation of the rows seen, divided by their number."""
        return (self.squares / self.count).sqrt()


def measure(manifest: Manifest, split: str, backbone: Any, batch: int, read: Read = decode) -> dict[str, Any]:
    """Statistics of all readable images of a split, read as in training.

    Returns:
        mean, std: d numbers each; count: images; bad: samples left out; split; backbone: the options of the tower.

    Raises:
        BadInput: if no image is readable.
    """
    moments, bad = Moments(), 0
    vision = backbone.build_vision()
    transform = backbone.image_transform(False)
    with Progress("features", manifest.samples(split)) as progress:
        for taken, samples, unreadable in _ahead(image_batches(manifest, split, transform, batch, read)):
            bad += unreadable
            if taken:
                images, refused = make_of_most(
                    taken,
                    lambda some: backbone.collate_images([image for sample in some for image in sample.images]),
                    lambda: usual_pictures(manifest, split, transform, read),
                )
                for i in refused:
                    log.warning("bad sample %s: its images cannot be packed with those of the others", taken[i].key)
                bad += len(refused)
                if len(refused) < len(taken):
                    moments.add(vision(images))
            progress.advance(samples)
    return _described(moments, bad, manifest, split)


def measure_kept(
    manifest: Manifest, split: str, recipe: Recipe, backbone: Any, batch: int, read: Read = decode
) -> dict[str, Any]:
    """Like `measure`, but with the store of `engine.cache_frozen`: stored values are read, others are computed and
    stored for training.

    Raises:
        BadInput: if no image is readable, or the store cannot be used.
    """
    width = backbone.statistics_width
    backbone.use_statistics({"mean": [0.0] * width, "std": [1.0] * width})  # the model has them after what is kept
    frozen = frozen_images.of_base(recipe, backbone, backbone.build().eval())
    moments, bad = Moments(), 0
    transform = backbone.image_transform(False)
    reader = ShardReader(manifest, split)
    with Progress("features", manifest.samples(split)) as progress:
        for number, shard in enumerate(manifest.shards(split)):
            for first in range(0, shard.samples, batch):
                wanted = range(first, min(first + batch, shard.samples))
                samples = []
                for sample, piece in zip(wanted, reader.read([(number, i) for i in wanted]), strict=True):
                    place = Place(shard_number(shard.sha256), shard.samples, sample)
                    stored = frozen.store.find(place)
                    pictures = Pictures("", list(map(StoredImage, stored or [])))
                    if stored is None:
                        pictures = _pictures(piece, transform, read)
                    bad += pictures is None
                    if pictures is not None and pictures.images:
                        samples.append(Sample(images=pictures.images, place=place))
                if samples:
                    packed = pack(samples, backbone.collate_apart, dict, dict)
                    packed = frozen.fill(packed, *frozen.passes([packed], [[1.0, 0.0, 0.0]]))
                    moments.add(backbone.statistics_rows(packed.images))
                progress.advance(len(wanted))
    reader.close()
    return _described(moments, bad, manifest, split)


def _described(moments: Moments, bad: int, manifest: Manifest, split: str) -> dict[str, Any]:
    if not moments.count:
        raise BadInput(
            f"{manifest.dir}: no readable image in split {split!r}; data_prep/verify.py shows what is wrong."
        )
    return {
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
        "count": moments.count,
        "bad": bad,
        "split": split,
    }


@dataclass
class Pictures:
    """The images of a sample, transformed."""

    key: str
    images: list[Any]


def image_batches(
    manifest: Manifest, split: str, transform: Callable[[Tensor, Any], Any], batch: int, read: Read
) -> Iterator[tuple[list[Pictures], int, int]]:
    """(good samples with images, samples read, samples left out as bad), about `batch` images at a time, in order."""
    reader = ShardReader(manifest, split)
    taken: list[Pictures] = []
    samples, bad = 0, 0
    for number, shard in enumerate(manifest.shards(split)):
        for first in range(0, shard.samples, batch):
            wanted = [(number, i) for i in range(first, min(first + batch, shard.samples))]
            for piece in reader.read(wanted):
                samples += 1
                sample = _pictures(piece, transform, read)
                bad += sample is None
                taken += [sample] if sample is not None and sample.images else []
                if sum(len(sample.images) for sample in taken) >= batch:
                    yield taken, samples, bad
                    taken, samples, bad = [], 0, 0
    reader.close()
    if samples:
        yield taken, samples, bad


def usual_pictures(
    manifest: Manifest, split: str, transform: Callable[[Tensor, Any], Any], read: Read
) -> list[Pictures]:
    """The images of some samples from all over a split, without bad ones."""
    reader = ShardReader(manifest, split)
    read = [
        _pictures(piece, transform, read) for piece in reader.read(spread([shard.samples for shard in reader.shards]))
    ]
    reader.close()
    return [sample for sample in read if sample is not None and sample.images]


def _pictures(piece: bytes | BadSample, transform: Callable[[Tensor, Any], Any], read: Read) -> Pictures | None:
    """All images of a sample, or None if one of them, or the sample, cannot be used, as in training."""
    try:
        if isinstance(piece, BadSample):
            raise piece
        stored = parse_sample(piece)
        images = [apply(transform, read(data), None) for data in stored.images]
        return Pictures(stored.key, images)
    except BadSample:
        return None


def _ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches, each made while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
