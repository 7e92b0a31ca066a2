"""One sample, from its bytes to what is packed into a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import Sample, as_frames, check_images, with_images
from mmpeft_ds.data.decode import picture_reader
from mmpeft_ds.data.frozen_store import FrozenStore, Place, StoredImage
from mmpeft_ds.data.identity import PICTURE, content_id
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.parsing import npy_array, size_in_memory
from mmpeft_ds.data.shards import check_bytes, image_names, record_of
from mmpeft_ds.data.stream_source import StreamSource
from mmpeft_ds.data.transform import apply, hooks_of
from mmpeft_ds.data.video import Times, Video, stacked, times_of
from mmpeft_ds.errors import BadSample


def make_sample(
    source: StreamSource,
    options: DataOptions,
    sample_id: str,
    parts: dict[str, bytes],
    seed: int,
    image_of: Callable[[str], Tensor],
    *,
    place: Place | None = None,
    store: FrozenStore | None = None,
) -> Sample:
    """Read, decode and transform a sample.

    Args:
        parts: name of each member -> its bytes.
        seed: of the random choices for this sample.
        image_of: name of a member -> the image in it, as `image_reader` decodes it.
        place: of the sample in a store of values.
        store: where values of images are looked up, so that these need not be decoded.

    Raises:
        BadSample: it cannot be used.
    """
    generator = torch.Generator().manual_seed(seed)
    record = _record(parts, source.fields)
    if source.identify:
        identify(record, parts)
    texts, targets = _read(source, record, generator)
    sample = Sample(sample_id, 1.0, targets=targets, record=record, place=place)
    videos = times_of(record, len(image_names(parts))) if "features" not in record else []
    as_images = source.video_transform is None
    stored = None if place is None or store is None else store.find(place)
    if stored is not None and (as_images or not videos):
        sample.images = [StoredImage(spelling) for spelling in stored]
    else:
        media = _media(source, options, parts, record, [] if as_images else videos, image_of)
        _transform(source, sample, media, generator, options.max_sample_bytes)
    check_images(len(sample.images), source.most_images)
    texts = as_frames(texts, videos) if as_images else texts
    sample.texts = with_images(texts, sample.images, sample.videos)
    return sample


def image_reader(source: StreamSource, options: DataOptions) -> Callable[[bytes], Tensor]:
    """Decoder of the images of a source, which may stop at the size that its transform needs."""
    min_size = hooks_of(source.image_transform).min_size if options.decode == "scaled" else None
    return functools.partial(picture_reader(options), min_size=min_size)


def _read(source: StreamSource, record: dict[str, Any], generator: torch.Generator) -> tuple[list[str], list[Any]]:
    """Texts and targets of a record. Raises BadSample."""
    try:
        texts, targets = source.read(record, generator)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        # The record has another structure than the task expects; tasks need not check every type.
        raise BadSample("type", f"{type(error).__name__}: {error}") from error
    if len(texts) != len(targets):
        raise BadSample("type", f"{len(texts)} texts but {len(targets)} targets")
    return texts, targets


def _transform(
    source: StreamSource, sample: Sample, media: Iterable[Tensor | Video], generator: torch.Generator, limit: int
) -> None:
    """Transform images and videos into a sample. Raises BadSample where they take more than `limit` bytes."""
    held = 0
    for medium in media:
        if isinstance(medium, Video):
            sample.videos.append(apply(source.video_transform, medium))
            sample.times.append(medium.times.of_frames)
            held += size_in_memory(sample.videos[-1])
        else:
            sample.images.append(apply(source.image_transform, medium, generator))
            held += size_in_memory(sample.images[-1])
        check_bytes(held, limit)


def _media(
    source: StreamSource,
    options: DataOptions,
    parts: dict[str, bytes],
    record: dict[str, Any],
    videos: list[Times],
    image_of: Callable[[str], Tensor],
) -> Iterator[Tensor | Video]:
    """Decoded images and videos of a sample, or its stored features, which are taken out of the record."""
    transform = hooks_of(source.image_transform)
    if transform.takes_features:
        features = record.pop("features", None)
        if features is not None:
            _check_width(features, source.manifest)
            yield from features if features.dim() > 2 else (features,)
        return
    names = image_names(parts)
    images = len(names) - sum(len(video.of_frames) for video in videos)
    yield from map(image_of, names[:images])
    if not videos:
        return
    read = picture_reader(options)
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
