"""Streams of samples for training and evaluation, made from a resolved recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.parsing import one_sample
from mmpeft_ds.data.samples import identify, with_arrays
from mmpeft_ds.data.shards import ShardReader, Stamp, members, record_of, stamps_of, verify_shards
from mmpeft_ds.data.stream import Stream, StreamSource
from mmpeft_ds.data.thumbnails import Thumbnails
from mmpeft_ds.data.token_plan import Lengths
from mmpeft_ds.distributed.collectives import gather_everywhere, rank, world_size
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource
from mmpeft_ds.engine.token_counts import lengths_of
from mmpeft_ds.errors import BadInput, BadSample

CHUNK = 256  # records read at a time
SLOTS = 16  # of a global batch that an adapter's start is computed from


def make_stream(
    resolved: Resolved,
    sources: list[ResolvedSource],
    ranks: Ranks,
    *,
    train: bool,
    augment: bool | None = None,
    lengths: Sequence[Lengths] = (),
) -> Stream:
    """The stream of this rank over `sources`. Collective.

    Args:
        train: order, sampling and accumulation of training; False: every sample once.
        augment: transform images as in training; None: as `train`.
        lengths: of the sources, where micro-batches are planned by tokens; none: they are found out.
    """
    recipe, backbone = resolved.recipe, resolved.backbone
    if train and recipe.data.pack:
        lengths = lengths or [lengths_of(resolved, source, ranks) for source in sources]
    entries = [
        StreamSource(
            manifest=source.manifest,
            split=source.options.split,
            read=source.task.read if train else source.task.read_all,
            image_transform=backbone.image_transform(train if augment is None else augment),
            collate_images=backbone.collate_images,
            collate_apart=backbone.collate_apart,
            collate_texts=backbone.collate_texts,
            collate_targets=source.task.collate,
            collates_by_row=source.task.collates_by_row,
            loss_weight=source.task.weight if train else None,
            fields=source.task.fields,
            weight=source.options.weight,
            subset=source.subset,
            most_images=backbone.most_images,
            identify=source.task.identifies_pictures,
            stamps=_stamps(source),
            video_transform=backbone.video_transform(),
            collate_videos=backbone.collate_videos,
        )
        for source in sources
    ]
    return Stream(
        entries,
        recipe.data,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=recipe.optim.accumulation if train else 1,
        seed=recipe.seed if recipe.data.seed is None else recipe.data.seed,
        train=train,
        coupled=resolved.method_options.couples_samples or sources[0].task.couples_samples,
        pin_memory=ranks.device.type == "cuda",
        lengths=lengths,
    )


def _stamps(source: ResolvedSource) -> list[Stamp]:
    """Stamps of all shards of a source, of which each rank looks at its share. Collective.

    Where machines have copies of their own, whose files have other times, each rank looks at those of its machine.
    """
    manifest, split = source.manifest, source.options.split
    first_shard = stamps_of(manifest, split, 0, max(1, len(manifest.shards(split))))
    everyone = gather_everywhere([(first_shard, stamps_of(manifest, split, rank(), world_size()))])
    if any(seen != first_shard for seen, _ in everyone):
        return stamps_of(manifest, split)
    shares = [share for _, share in everyone]
    merged: list[Stamp] = [(-1, -1)] * sum(map(len, shares))
    for first, share in enumerate(shares):
        merged[first :: len(shares)] = share
    return merged


def thumbnails_of(source: ResolvedSource, stored: bool = False) -> Thumbnails | None:
    """Thumbnails of samples whose batches hold no pixels: of feature shards, or where values of frozen towers are
    `stored`. None for others, whose batches hold the images themselves."""
    return Thumbnails(source.manifest, source.options.split) if source.manifest.towers or stored else None


def total_steps(recipe: recipes.Recipe, stream: Stream, gradient_free: bool = False) -> int:
    """Optimizer steps of the whole run; 0 for a method that learns without gradients."""
    if gradient_free:
        return 0
    return recipe.optim.max_steps or sum(stream.steps_per_epoch(e) for e in range(recipe.optim.epochs))


def first_batches(resolved: Resolved, ranks: Ranks) -> Iterator[tuple[Any, PackedBatch]]:
    """Task and packed batch, of the training data from its first step on, epoch by epoch, on the device of this rank.

    All ranks see the same, and the same for any number of ranks: of each global batch at most SLOTS slots. Batches
    without a text, of padding or bad samples alone, are left out. Collective at its beginning.

    Raises:
        BadInput: there is no other batch in a whole epoch.
    """
    one = dataclasses.replace(ranks, rank=0, world_size=-(-resolved.recipe.data.global_batch // SLOTS))
    stream = make_stream(resolved, resolved.train, one, train=True)
    try:
        for epoch in itertools.count():
            usable = 0
            for step in stream.epoch(epoch):
                task = resolved.train[step.source].task
                for batch in step.micro:
                    if "text" in batch.modalities:
                        usable += 1
                        yield task, batch.to(ranks.device)
            if not usable:
                raise BadInput(
                    "data.sources: no sample of the first epoch can be used, and the method starts from them. The bad "
                    "ones are named above; data_prep/verify.py checks a directory."
                )
    finally:
        stream.close()


def check_shards(resolved: Resolved, ranks: Ranks) -> None:
    """Check the shards of all sources, each rank its share. Collective.

    Raises:
        BadInput: on all ranks, with the first problem and their number.
    """
    mode = resolved.recipe.data.verify
    splits = {(s.manifest.dir, s.options.split): s.manifest for s in (*resolved.train, *resolved.validation)}
    mine = [
        problem
        for (_, split), manifest in splits.items()
        for problem in verify_shards(manifest, split, mode, ranks.rank, ranks.world_size)
    ]
    everyone: list[Any] = [mine]
    if ranks.world_size > 1:
        everyone = [None] * ranks.world_size
        torch.distributed.all_gather_object(everyone, mine)
    problems = [problem for part in everyone for problem in part]
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BadInput(f"{problems[0]}{more}")


def items_of(source: ResolvedSource) -> int:
    """Number of questions, captions or other items of a source that the task scores."""
    field = source.task.items
    if not field:
        return source.samples
    counted = source.manifest.fields.get(source.options.split, {}).get(f"{field}[]")
    if source.subset is None and counted is not None:
        return counted["present"]
    return sum(len(record.get(field, [])) for record in records(source))


def records(
    source: ResolvedSource, usable: bool = False, only: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The json of every sample that is used of a split and can be parsed, in order; images are not decoded.

    Args:
        usable: leave out those that the task refuses as well.
        only: ids of the samples to read, such as those that an evaluation has scored; None: all.
    """
    manifest, split = source.manifest, source.options.split
    reader = ShardReader(manifest, split)
    places = [range(s.samples) for s in manifest.shards(split)] if source.subset is None else None
    try:
        for number, rows in enumerate(places or source.subset.places(manifest)):
            for first in range(0, len(rows), CHUNK):
                wanted = [(number, int(i)) for i in rows[first : first + CHUNK]]
                for piece in reader.read(wanted):
                    with contextlib.suppress(BadSample):  # the stream says what is wrong with it
                        sample_id, record = _record_in(piece, source, usable)
                        if only is None or sample_id in only:
                            yield record
    finally:
        reader.close()


def _record_in(piece: bytes | BadSample, source: ResolvedSource, usable: bool) -> tuple[str, dict[str, Any]]:
    """(id, json) of one sample. Raises BadSample."""
    with one_sample():
        if isinstance(piece, BadSample):
            raise piece
        key, parts = members(piece)
        record = record_of(parts)
        if source.task.identifies_pictures:
            identify(record, parts)
        if usable:
            source.task.read_all(with_arrays(dict(record), parts), torch.Generator())
        return f"{source.manifest.name}/{key}", record
