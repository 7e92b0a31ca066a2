"""Tokens of every sample of a source, by which micro-batches are planned; counted once and stored next to the data.

The counts are those of the backbone's tokenizer, template, limits and image rule, and of the task's texts; the name of
the file has a hash of all these. A task that draws texts again in each epoch is counted by one drawing.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common.stock import short_hash
from mmpeft_ds.data import order
from mmpeft_ds.data.decode import Pixels, size_of
from mmpeft_ds.data.manifest import local_path
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.parsing import one_sample
from mmpeft_ds.data.samples import identify
from mmpeft_ds.data.shards import ShardReader, image_names, members, record_of
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.data.token_plan import UNIT, Lengths
from mmpeft_ds.data.video import Times, times_of
from mmpeft_ds.data.workers import WorkerPool
from mmpeft_ds.distributed.collectives import first_message, gather_everywhere, on_rank0
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource
from mmpeft_ds.engine.text_check import places_of, split_sizes, with_media
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.files import replacing, writing
from mmpeft_ds.progress import Progress
from mmpeft_ds.tasks.base import TaskBase

log = logging.getLogger(__name__)
CHUNK = 64  # samples counted at a time
NONE = np.zeros((0, len(TokenCounts._fields)), np.int64)
UNREAD = -1  # tokens of a sample that could not be read
FEW = 2000  # samples for which no workers are started


def lengths_of(resolved: Resolved, source: ResolvedSource, ranks: Ranks) -> Lengths:
    """Tokens and costs of the samples of a source; see `token_counts`. Collective."""
    return as_lengths(resolved, token_counts(resolved, source, ranks))


def as_lengths(resolved: Resolved, counts: np.ndarray) -> Lengths:
    """Counts (samples, 5) with their costs. A sample that was not read is taken to be as long as the longest, since it
    may have been mended when it is trained on."""
    if len(counts):
        counts = np.where(counts[:, :1] == UNREAD, np.maximum(counts.max(0), 0), counts)
    costs = resolved.backbone.costs(TokenCounts(*counts.T))
    return Lengths(counts[:, 0], np.rint(UNIT * costs).astype(np.int64))


def token_counts(resolved: Resolved, source: ResolvedSource, ranks: Ranks) -> np.ndarray:
    """(samples, 5) int64, `BackboneBase.tokens` of each sample that is used, in the order of the shards; UNREAD where
    it cannot be read.

    Taken from the file beside the data where there is one. Samples that it lacks, or that could not be read, are
    counted by all ranks together, and rank 0 writes the file. Collective.

    Raises:
        BadInput: on all ranks: a shard cannot be read.
    """
    file = file_of(resolved, source)
    counts = on_rank0(lambda: read(file, source.samples))
    places = places_of(source)
    if counts is None:
        counts = np.full((len(places), len(TokenCounts._fields)), UNREAD, np.int64)
    wanted = np.flatnonzero(counts[:, 0] == UNREAD)
    if not len(wanted):
        return counts
    mine, problem = NONE, ""
    own = wanted[ranks.rank * len(wanted) // ranks.world_size : (ranks.rank + 1) * len(wanted) // ranks.world_size]
    try:
        title = f"tokens of {source.manifest.name}-{source.options.split}"
        mine = count(resolved, source, [places[i] for i in own], title if ranks.rank == 0 else "")
    except BadInput as error:
        problem = str(error)
    if problem := first_message(problem):
        raise BadInput(problem)
    counted = np.concatenate(gather_everywhere([mine]))
    if len(wanted) == len(counts) or (counted[:, 0] != UNREAD).any():
        counts[wanted] = counted
        on_rank0(lambda: _write(file, counts))
    return counts


def count(resolved: Resolved, source: ResolvedSource, places: list[tuple[int, int]], title: str = "") -> np.ndarray:
    """`token_counts` of the samples at these (shard, sample).

    Args:
        title: of the progress that is shown; empty for none.
    """
    data = resolved.recipe.data
    counter = _Counter(resolved.backbone, source, data)
    pool = WorkerPool(counter, data.workers if len(places) > FEW else 0, data.prefetch)
    chunks = [places[i : i + CHUNK] for i in range(0, len(places), CHUNK)]
    progress = Progress(title, len(places), "samples", shown=bool(title))
    counts = [NONE]
    try:
        with progress:
            for part in pool.run(chunks):
                counts.append(part)
                progress.advance(len(part))
    finally:
        pool.close()
        counter.close()
    return np.concatenate(counts)


def summary(resolved: Resolved, source: ResolvedSource, counts: np.ndarray) -> str:
    """The counts in one line."""
    read = counts[counts[:, 0] != UNREAD]
    unread = f", {len(counts) - len(read):,} not read" if len(read) < len(counts) else ""
    file = file_of(resolved, source)
    tokens, _, _, patches, _ = read.sum(0).tolist()
    where = f": {file}" if file is not None and file.is_file() else ", kept nowhere"
    return f"{len(counts):,} samples{unread}, {tokens:,} tokens, {patches:,} patches{where}"


def file_of(resolved: Resolved, source: ResolvedSource) -> Path | None:
    """The file of a source's counts: next to its data, or below `data.cache_dir` for remote data; None if it has no
    place."""
    folder = local_path(source.manifest.dir) or resolved.recipe.data.cache_dir
    if not folder:
        return None
    if not local_path(source.manifest.dir):
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    facts = {
        "unread": UNREAD,
        "columns": TokenCounts._fields,
        "backbone": [type(resolved.backbone).__name__, resolved.backbone.tokens_key()],
        "task": [source.options.task, dataclasses.asdict(source.task.options)],
        "shards": [shard.sha256 for shard in source.manifest.shards(source.options.split)],
        "subset": sorted(source.subset.keys) if source.subset else None,
        "pixels": resolved.recipe.data.pixels,  # a picture that is not turned has other sides
    }
    return Path(folder) / f"tokens-{source.manifest.name}-{source.options.split}-{short_hash(facts)}.npy"


def read(file: Path | None, samples: int) -> np.ndarray | None:
    """The counts in a file; None if there is none, or not of as many samples."""
    if file is None or not file.is_file():
        return None
    try:
        counts = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return counts if counts.shape == (samples, len(TokenCounts._fields)) and counts.dtype == np.int64 else None


def _write(file: Path | None, counts: np.ndarray) -> None:
    if file is None or not os.access(file.parent, os.W_OK):
        log.warning("token counts cannot be stored next to the data and are made again at the next start")
        return
    buffer = io.BytesIO()
    np.save(buffer, counts)
    with replacing(file) as temporary:
        temporary.write_bytes(buffer.getvalue())


class _Counter:
    """(shard, sample) of some samples -> (samples, 5) int64; works in other processes."""

    def __init__(self, backbone: BackboneBase, source: ResolvedSource, data: DataOptions):
        self.backbone, self.task, self.pixels = backbone, source.task, data.pixels
        self.reader = ShardReader(source.manifest, source.options.split, "", data.allow_pipe, data.max_sample_bytes)

    def __call__(self, places: list[tuple[int, int]]) -> np.ndarray:
        return np.array([self._tokens(piece) for piece in self.reader.read(places)], np.int64)

    def close(self) -> None:
        self.reader.close()

    def _tokens(self, piece: bytes | BadSample) -> TokenCounts:
        if isinstance(piece, BadSample):
            return TokenCounts(UNREAD, 0, 0)
        try:
            with one_sample():
                key, parts = members(piece)
                return self.backbone.tokens(*read_texts(self.backbone, self.task, key, parts, self.pixels))
        except BadSample:
            return TokenCounts(UNREAD, 0, 0)  # the stream will say what is wrong with it


def read_texts(
    backbone: BackboneBase, task: TaskBase, key: str, parts: dict[str, bytes], pixels: Pixels = "shown"
) -> tuple[list[Any], list[tuple[int, int]], list[tuple[int, int, Times]]]:
    """Texts of a sample as training reads them, (height, width) of its images, and height, width and times of its
    videos. Raises BadSample and whatever a task raises on a record of another form."""
    record = record_of(parts)
    if task.identifies_pictures:
        identify(record, parts)
    sizes = [size_of(parts[name], pixels) for name in image_names(parts)]
    texts, _ = task.read(record, torch.Generator().manual_seed(order.key_of(key)))
    videos = times_of(record, len(sizes))
    images, films = split_sizes(sizes, videos if "video" in backbone.modalities else [])
    return with_media(backbone, texts, sizes, videos), images, films
