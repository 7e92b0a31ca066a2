"""A micro-batch as large as a recipe allows: every text at its limit, every slot with its images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mmpeft_ds.data.batch import Described, PackedBatch, Prompted, Sample, pack, with_images
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.data.video import Video, evenly
from mmpeft_ds.errors import BadInput

PHOTOGRAPH = (480, 640)  # height and width that COCO's pictures have, for models that take pictures as they are


@dataclass(frozen=True)
class Filling:
    """Assumed contents of a sample.

    Attributes:
        images, texts: of each sample.
        image_size: (height, width) before the backbone's transform, of frames too.
        words: of each text, and of the answer where it has one; 0: as many as the backbone keeps.
        videos, frames: of each sample, and of each video.
        neighbours: of each sample in a graph by threshold.
    """

    images: int = 1
    texts: int = 1
    image_size: tuple[int, int] = PHOTOGRAPH
    words: int = 0
    videos: int = 0
    frames: int = 8
    neighbours: float = 16.0


@dataclass(frozen=True)
class Size:
    """Size of a micro-batch of equal samples.

    Attributes:
        samples: how many.
        row: tokens of the one row in which their texts stand, with `data.pack`; 0 for a row each.
    """

    samples: int
    row: int = 0

    @property
    def amount(self) -> int:
        """By which bytes and operations grow."""
        return self.row or self.samples


def tokens(backbone: Any, filling: Filling) -> int:
    """Tokens that the language model reads for one sample, of a backbone that packs."""
    return _counts(backbone, filling).tokens


def media_tokens(backbone: Any, filling: Filling) -> int:
    """Tokens of the images and videos of one sample beyond the one for each that the limit of a prompt counts; 0 for
    a backbone that does not count them."""
    if backbone.unpackable and "video" not in backbone.modalities:
        return 0
    return max(0, _counts(backbone, filling).of_images - filling.images - filling.videos)


def _counts(backbone: Any, filling: Filling) -> TokenCounts:
    text = _longest(backbone, filling.words)
    sizes, times = [filling.image_size] * filling.images, [evenly(filling.frames)] * filling.videos
    films = [(*filling.image_size, of_video) for of_video in times]
    return backbone.tokens(with_images([text] * filling.texts, sizes, times), sizes, *([films] if films else []))


def fill(backbone: Any, task: Any, size: Size, filling: Filling) -> PackedBatch:
    """A packed batch of that many equal samples of weight 1, on the CPU, with as many words as fill the row of `size`.

    Stored features are zeros.
    """
    images, videos = [], []
    if filling.videos:
        if "video" not in backbone.modalities:
            why = backbone.no_videos or "this backbone reads the frames of a video as images"
            raise BadInput(f"--videos-per-sample: {why}. Give --images-per-sample instead.")
        film = Video(torch.zeros(filling.frames, 3, *filling.image_size, dtype=torch.uint8), evenly(filling.frames))
        videos = [backbone.video_transform()(film)] * filling.videos
    if "image" in backbone.modalities:
        transform = backbone.image_transform(False)
        stored = hooks_of(transform).takes_features
        picture = backbone.dummy("image") if stored else torch.zeros(3, *filling.image_size, dtype=torch.uint8)
        images = [transform(picture, torch.Generator().manual_seed(0))] * filling.images
    text = backbone.dummy("text")
    if not isinstance(text, Described):  # which stands in place of stored features
        text = _longest(backbone, _words(backbone, filling, size) if size.row else filling.words)
    slot = Sample(weight=1.0, images=images, videos=videos, texts=[text] * filling.texts)
    slot.times = [evenly(filling.frames).of_frames] * filling.videos
    slot.targets = [task.dummy_target() for _ in slot.texts]
    slots = [dataclasses.replace(slot, sample_id=f"planned/{i}") for i in range(size.samples)]
    batch = pack(slots, backbone.collate_images, backbone.collate_texts, task.collate, backbone.collate_videos)
    batch.padding_free = bool(size.row)
    return batch


def _words(backbone: Any, filling: Filling, size: Size) -> int:
    """Words of each text, and of its answer, with which the samples fill the row."""
    one, two = (tokens(backbone, dataclasses.replace(filling, words=words)) for words in (1, 2))
    return 1 + max(0, size.row // size.samples - one) // max(1, two - one)


def _longest(backbone: Any, words: int) -> str | Prompted:
    """A text that reaches the limits of the backbone, or has so many words in each of its parts."""
    prompt, target = (words or getattr(backbone.options, name, 0) or 32 for name in _limits(backbone))
    if not (backbone.generates or backbone.ranks_answers):
        return " ".join(["a"] * prompt)
    # Half of what a conversation may hold is question: what is over the limit is cut from it.
    return Prompted(" ".join(["a"] * prompt), " ".join(["a"] * (target if words else max(1, target // 2))))


def _limits(backbone: Any) -> tuple[str, str]:
    return backbone.prompt_limit, backbone.target_limit
