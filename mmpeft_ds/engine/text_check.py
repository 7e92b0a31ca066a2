"""A look at the texts of prepared data before training; images are not decoded.

It counts the texts that are longer than the backbone's limits, that hold control tokens, or that it cannot read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.assumed import is_assumed
from mmpeft_ds.data.batch import CollatedTexts, Prompted, as_frames, with_images
from mmpeft_ds.data.decode import size_of
from mmpeft_ds.data.manifest import local_path
from mmpeft_ds.data.parsing import one_sample
from mmpeft_ds.data.shards import ShardReader, image_names, members, record_of
from mmpeft_ds.data.video import Times, times_of
from mmpeft_ds.engine.assembly.resolve import Resolved, ResolvedSource
from mmpeft_ds.engine.text_counts import TextCounts, note
from mmpeft_ds.errors import BadSample, counted

VIDEOS_COUNTED = 20  # samples whose videos are counted in tokens
LOOKED_AT = 200  # samples of a source in `train.py --check`, evenly over the split
CHUNK = 100  # records read at a time


@dataclass
class TextCheck:
    """Result for one source.

    Attributes:
        samples: how many were looked at.
        there: how many the source has.
        counts: of texts that would be changed.
        video_tokens: of each of the first samples with videos, as many as are counted.
        refused: kind of bad sample -> how many texts cannot be read by the backbone.
        first: sample and reason of the first of these.
    """

    samples: int
    there: int
    counts: TextCounts = field(default_factory=TextCounts)
    refused: dict[str, int] = field(default_factory=dict)
    first: str = ""
    video_tokens: list[int] = field(default_factory=list)

    def line(self, backbone: BackboneBase, source: ResolvedSource) -> str:
        """The result in words; empty if nothing is wrong."""
        parts = [note(backbone, [source.task], self.counts)] if self.counts else []
        if self.refused:
            kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.refused.items())
            parts.append(f"{counted(sum(self.refused.values()), 'bad sample')} ({kinds}), the first {self.first}")
        if self.video_tokens:
            most, mean = max(self.video_tokens), sum(self.video_tokens) / len(self.video_tokens)
            number = counted(len(self.video_tokens), "sample")
            parts.append(f"the videos of {number} come to {mean:,.0f} tokens each on average, {most:,} at most")
        if not parts:
            return ""
        of = f" of {self.there:,}" if self.samples < self.there else ""
        return f"{source.options.dir} ({source.options.split}), {self.samples:,}{of} samples: {'; '.join(parts)}."

    def add_videos(
        self,
        backbone: BackboneBase,
        parts: dict[str, bytes],
        pictures: list[str],
        videos: list[Times],
    ) -> None:
        """Count the tokens of the videos of a sample, where the model reads them and few are counted yet."""
        if not videos or "video" not in backbone.modalities or len(self.video_tokens) >= VIDEOS_COUNTED:
            return
        sizes = [size_of(parts[name]) for name in pictures]
        images, films = split_sizes(sizes, videos)
        of_images = backbone.tokens([], images)[1]
        self.video_tokens.append(backbone.tokens([], images, films)[1] - of_images)


def with_media(
    backbone: BackboneBase, texts: list[Any], pictures: Sequence[Any], videos: Sequence[Times]
) -> list[Any]:
    """Texts of a sample with the number of its images and videos set, as the backbone reads them. Raises BadSample."""
    if "video" in backbone.modalities:
        images = len(pictures) - sum(len(video.of_frames) for video in videos)
        return with_images(texts, pictures[:images], videos)
    return with_images(as_frames(texts, videos), pictures)


def split_sizes(
    sizes: Sequence[tuple[int, int]], videos: Sequence[Times]
) -> tuple[list[tuple[int, int]], list[tuple[int, int, Times]]]:
    """(height, width) of the images of a sample, and of its videos with their times, from those of its pictures."""
    at = len(sizes) - sum(len(video.of_frames) for video in videos)
    images, films = list(sizes[:at]), []
    for video in videos:
        films.append((*sizes[at], video))
        at += len(video.of_frames)
    return images, films


def reads_texts(backbone: BackboneBase) -> bool:
    """Whether the backbone turns texts into tokens and counts what it changes."""
    return isinstance(backbone.collate_texts([backbone.dummy("text")]), CollatedTexts)


def check_texts(
    resolved: Resolved, sources: Sequence[ResolvedSource], most: int = 0
) -> Iterator[tuple[ResolvedSource, TextCheck]]:
    """Each source that lies on this machine, and the result of looking at its texts.

    Args:
        most: samples of a source; 0: all.
    """
    backbone = resolved.backbone
    here = [s for s in sources if not is_assumed(s.manifest) and local_path(s.manifest.dir) is not None]
    for source in here if here and reads_texts(backbone) else ():
        yield source, _checked(backbone, source, most)


def _checked(backbone: BackboneBase, source: ResolvedSource, most: int) -> TextCheck:
    places = places_of(source)
    if 0 < most < len(places):
        places = [places[i] for i in np.linspace(0, len(places) - 1, most).astype(int)]
    result = TextCheck(len(places), source.samples)
    reader = ShardReader(source.manifest, source.options.split)
    try:
        for start in range(0, len(places), CHUNK):
            for piece in reader.read(places[start : start + CHUNK]):
                _look(backbone, source, piece, result)
    finally:
        reader.close()
    return result


def places_of(source: ResolvedSource) -> list[tuple[int, int]]:
    """(shard, sample) of all samples of a source."""
    shards = source.manifest.shards(source.options.split)
    rows = [range(s.samples) for s in shards] if source.subset is None else source.subset.places(source.manifest)
    return [(shard, int(i)) for shard, numbers in enumerate(rows) for i in numbers]


def _look(backbone: BackboneBase, source: ResolvedSource, piece: bytes | BadSample, result: TextCheck) -> None:
    """Count the texts of one sample. What is wrong with it otherwise is the business of verify.py."""
    try:
        with one_sample():
            if isinstance(piece, BadSample):
                raise piece
            key, parts = members(piece)
            record, pictures = record_of(parts), image_names(parts)
            videos = times_of(record, len(pictures))
            texts = with_media(backbone, source.task.every_text(record), pictures, videos)
            result.add_videos(backbone, parts, pictures, videos)
    except BadSample:
        return
    cut: set[Any] = set()  # a question that stands there once for each of its answers is counted once
    for number, text in enumerate(texts):
        try:
            with one_sample():
                changes = backbone.collate_texts([text]).changes
        except BadSample as bad:
            result.refused[bad.kind] = result.refused.get(bad.kind, 0) + 1
            result.first = result.first or f"{key}: {bad}"
        else:
            prompt, *others = (changes > 0).sum(0).tolist()
            asked = (text.turns, text.prompt) if isinstance(text, Prompted) else number
            result.counts.add(source.task, [prompt and asked not in cut, *others])
            cut |= {asked} if prompt else set()
