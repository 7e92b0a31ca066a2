"""Packed batches: every sample is a slot that owns any number of images and texts.

Several questions about an image, two images per question, video frames, samples of text alone, and slots without a
sample (padding and bad samples, of weight 0) are one case. A frozen tower runs once per image, however many texts
belong to it.
"""

# S slots of this rank's micro-batch, I images, V videos, T texts, L text length

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.data.frozen_store import Place, StoredImage
from mmpeft_ds.errors import BadSample
from mmpeft_ds.host_copies import both, to_device

if TYPE_CHECKING:
    from mmpeft_ds.data.video import Times

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
FRESH, STORED, DUMMY = 0, 1, 2  # an image whose value must be computed, is stored, or does not matter


@dataclass(frozen=True)
class Prompted:
    """A text in two parts, for generative models.

    Attributes:
        prompt: text that the model reads; it is not part of the loss.
        target: text that it should generate; empty if unknown.
        turns: earlier turns of a conversation, as (role, text), with roles `system`, `user` and `assistant`. Those of
            the assistant enter the loss as `target` does.
        images, videos: number of images and of videos of the sample, set by packing. IMAGE_MARK and VIDEO_MARK in
            prompt and turns stand for one each, in their order; without any mark of its kind they come first.
        spellings, video_spellings: what the text says in place of each, where the image or video decides
            (`Spelled`), set by packing; empty: one mark of the model's.
    """

    prompt: str
    target: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    images: int | None = None
    spellings: tuple[str, ...] = ()
    videos: int = 0
    video_spellings: tuple[str, ...] = ()

    def with_images(
        self, images: int, spellings: tuple[str, ...] = (), videos: int = 0, video_spellings: tuple[str, ...] = ()
    ) -> Prompted:
        """A copy for a sample with that many. Raises BadSample if its texts name another number of them."""
        for kind, mark, number in (("images", IMAGE_MARK, images), ("videos", VIDEO_MARK, videos)):
            named = self.marks(mark)
            if named not in (0, number):
                raise BadSample(kind, f"the text names {mark} {named} times, but the sample has {number} {kind}")
        return dataclasses.replace(
            self, images=images, spellings=spellings, videos=videos, video_spellings=video_spellings
        )

    def marks(self, mark: str = IMAGE_MARK) -> int:
        """Number of times that its texts name an image or video."""
        return sum(text.count(mark) for text in (self.prompt, *(text for _, text in self.turns)))

    def with_frames(self, frames: Sequence[int]) -> Prompted:
        """A copy that names each of so many frames of each video as an image.

        Raises:
            BadSample: if it names another number of videos, or an image after one, whose frames stand after all
                images.
        """
        texts = [*(text for _, text in self.turns), self.prompt]
        kinds = [mark for text in texts for mark in MARKS.findall(text)]
        if kinds.count(VIDEO_MARK) not in (0, len(frames)) or kinds != sorted(kinds):
            raise BadSample("videos", f"frames are read as images, which is for {len(frames)} {VIDEO_MARK} after all")
        left = iter(frames)
        texts = [re.sub(VIDEO_MARK, lambda _: "\n".join([IMAGE_MARK] * next(left)), text) for text in texts]
        turns = tuple((role, text) for (role, _), text in zip(self.turns, texts, strict=False))
        return dataclasses.replace(self, prompt=texts[-1], turns=turns)


@dataclass(frozen=True)
class Described:
    """A text that belongs to a sample, such as a caption, and its stored features where there are any.

    Attributes:
        text: may be empty.
        features: (D,) of a frozen text encoder, not normalised; None if none are stored.
    """

    text: str = ""
    features: Tensor | None = None

    def __str__(self) -> str:
        return self.text


class Spelled(dict[str, Tensor]):
    """A transformed image or video whose size or content decides how the text spells it.

    Attributes:
        spelling: text that stands for it in that of a language model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], spelling: str):
        super().__init__(tensors)
        self.spelling = spelling

    def __reduce__(self) -> Any:
        return Spelled, (dict(self), self.spelling)


class CollatedTexts(dict[str, Tensor]):
    """Forward arguments of the text side, as `collate_texts` returns them, with counts of what is not as in the texts.

    Attributes:
        changes: (T, 3) int64: tokens cut from the prompt, tokens cut from the target, control tokens read as words.
    """

    def __init__(self, tensors: Mapping[str, Tensor], changes: Tensor):
        super().__init__(tensors)
        self.changes = changes


@dataclass
class Sample:
    """One decoded slot, before packing.

    Attributes:
        sample_id: `dataset/key` as the manifest names it; empty for padding.
        weight: 1 for a good sample, 0 for padding, a bad sample or a dummy.
        images, videos: results of the backbone's transforms, in order.
        times: of the frames of each video, in seconds.
        texts: strings, `Prompted` for generative models, or `Described` where features are stored.
        targets: one task-defined target per text.
        record: the sample's JSON, for metrics and the page of predictions.
        bad: (kind, shard, key) if the sample could not be used.
        place: which sample it is to a store of what frozen towers give; images may then be `StoredImage`s, all of
            them. None: nothing is stored.
    """

    sample_id: str = ""
    weight: float = 0.0
    images: list[Any] = field(default_factory=list)
    texts: list[str | Prompted | Described] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    bad: tuple[str, str, str] | None = None
    place: Place | None = None
    videos: list[Any] = field(default_factory=list)
    times: list[tuple[float, ...]] = field(default_factory=list)


@dataclass
class Counts:
    """Numbers of a micro-batch that are summed over ranks and micro-steps before its step.

    Attributes:
        loss_weight: by which the loss is divided, as the task counts it.
        rows: texts (slots, where there are no texts) that enter the loss.
        keys_hash: `PackedBatch.sample_keys_hash`.
        changed: `PackedBatch.changed_texts`.
    """

    loss_weight: float
    rows: int
    keys_hash: int
    changed: list[int]


@dataclass
class PackedBatch:
    """Slots of one micro-batch on one rank.

    Attributes:
        sample_id: S strings.
        weight: (S,) float32; a slot of weight 0 is left out of loss, graph and metric.
        images: forward arguments of the image side, first dimension I (or as the backbone packs them); empty if none.
        image_owner: (I,) int64, slot that owns image i, non-decreasing.
        texts: forward arguments of the text side, each (T, L); empty without texts.
        text_owner: (T,) int64, slot that owns text j, non-decreasing.
        targets: as the task has collated them, first dimension T.
        records: S json objects; raw texts are kept under `raw_texts`.
        raw_texts: T strings, or `Prompted` with the number of images set.
        bad: (kind, shard, key) of the slots that could not be used.
        changes: (T, 3) as in `CollatedTexts`; None if nobody counted.
        padding_free: a language model is to read all texts as one row, one after the other and each by itself. Here
            they are padded as ever; the backbone makes the row, since it knows how many tokens an image becomes.
        image_places: (I, 5) int64 where what frozen towers give is stored or computed apart: FRESH, STORED or DUMMY,
            the three numbers of the sample's `Place`, and which of its images. `images` then holds the fresh ones
            alone, until `engine.frozen_images` has put the values of all in their place. None elsewhere.
        spellings: of the images, with `image_places`.
        videos: forward arguments of videos, as `images`; empty if none.
        video_owner: (V,) int64, slot that owns video i, non-decreasing.
        video_times: of the frames of each video, in seconds.
        counts: made by the loader, since a dozen calls of torch on a few numbers, each for the first time after the
            arithmetic of a step, take half a millisecond in the process that trains. None: nobody has counted.
        keys_hash: `sample_keys_hash` where it is known from the hashes of the samples; else None.
        id_numbers: (S,) `id_number` of the sample ids where they are known; else None.
    """

    sample_id: list[str]
    weight: Tensor
    images: dict[str, Tensor]
    image_owner: Tensor
    texts: dict[str, Tensor]
    text_owner: Tensor
    targets: dict[str, Tensor]
    records: list[dict[str, Any]]
    raw_texts: list[str | Prompted]
    bad: list[tuple[str, str, str]]
    changes: Tensor | None = None
    padding_free: bool = False
    image_places: Tensor | None = None
    spellings: list[str] = field(default_factory=list)
    videos: dict[str, Tensor] = field(default_factory=dict)
    video_owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    video_times: list[tuple[float, ...]] = field(default_factory=list)
    counts: Counts | None = None
    keys_hash: int | None = None
    id_numbers: Tensor | None = None

    @functools.cached_property
    def modalities(self) -> frozenset[str]:
        """Those of `image`, `video` and `text` of which this micro-batch has any."""
        present = {"image": len(self.image_owner), "video": len(self.video_owner), "text": len(self.text_owner)}
        return frozenset(name for name, count in present.items() if count)

    @functools.cached_property
    def text_weight(self) -> Tensor:
        """(T,) weight of the slot that owns each text."""
        return both(lambda weight, owner: weight[owner], self.weight, self.text_owner)

    def changed_texts(self) -> list[int]:
        """Numbers of texts of weight > 0 with a cut prompt, with a cut target, and with control tokens that are read
        as words."""
        if self.changes is None or not self.changes.any():
            return [0, 0, 0]
        return ((self.changes > 0) & (self.text_weight > 0)[:, None]).sum(0).tolist()

    def count(self, loss_weight: Callable[[PackedBatch], float]) -> Counts:
        """What `counts` are.

        Args:
            loss_weight: `TaskBase.weight`.
        """
        kept = self.text_weight if self.text_owner.numel() else self.weight
        keys_hash = self.sample_keys_hash() if self.keys_hash is None else self.keys_hash
        return Counts(loss_weight(self), int((kept > 0).sum()), keys_hash, self.changed_texts())

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """This batch, or a copy where its tensors are elsewhere than on `device`; whole numbers and weights of them
        are still known here.

        See `host_copies.on_host`.
        """
        if self.weight.device == torch.device(device):
            return self
        return self._mapped(lambda tensor: to_device(tensor, device, non_blocking))

    def pin_memory(self) -> PackedBatch:
        """A copy in pinned memory, from which a GPU copies while it computes; the loader calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        def mapped(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, dict):
                return {k: mapped(v) for k, v in value.items()}
            return value

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return PackedBatch(**{k: v if k == "records" else mapped(v) for k, v in fields.items()})

    def sample_keys_hash(self) -> int:
        """Sum mod 2^64 of the hashes of the sample ids that enter the loss; adds up over ranks and micro-steps."""
        kept = (s for s, w in zip(self.sample_id, self.weight.tolist(), strict=True) if w > 0)
        return sum(hash_id(s) for s in kept) % 2**64


def hash_id(sample_id: str) -> int:
    """Stable 64-bit hash of a sample id."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big")


def hash_ids(sample_ids: Iterable[str]) -> np.ndarray:
    """`hash_id` of many, uint64."""
    blake = hashlib.blake2b
    digests = b"".join([blake(name.encode(), digest_size=8).digest() for name in sample_ids])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def id_number(sample_id: str) -> int:
    """The hash of a sample id as a positive int64, without its last bit."""
    return hash_id(sample_id) >> 1


def with_images(texts: Sequence[Any], images: Sequence[Any], videos: Sequence[Any] = ()) -> list[Any]:
    """`texts` of a sample with these transformed images and videos, which are set in `Prompted` ones.

    Raises:
        BadSample: if a text names another number of them.
    """
    if not any(isinstance(t, Prompted) for t in texts):
        return list(texts)
    of_images, of_videos = (tuple(filter(None, map(spelling_of, media))) for media in (images, videos))
    given = len(images), of_images, len(videos), of_videos
    return [t.with_images(*given) if isinstance(t, Prompted) and t.images is None else t for t in texts]


def as_frames(texts: Sequence[Any], videos: Sequence[Times]) -> list[Any]:
    """`texts` of a sample whose videos are read as images, see `Prompted.with_frames`. Raises BadSample."""
    frames = [len(video.of_frames) for video in videos]
    return [t.with_frames(frames) if frames and isinstance(t, Prompted) else t for t in texts]


def spelling_of(image: Any) -> str:
    """The text that stands for a transformed image; empty where the image does not decide it."""
    return image.spelling if isinstance(image, (Spelled, StoredImage)) else ""


def check_images(number: int, most: int) -> None:
    """Raise BadSample if a sample has more images than a model takes; `most` 0 is any number."""
    if 0 < most < number:
        raise BadSample("images", f"{number} images, but the model tells {most} apart at most")


def pack(
    samples: Sequence[Sample],
    collate_images: Callable[[list[Any]], dict[str, Tensor]],
    collate_texts: Callable[[list[Any]], dict[str, Tensor]],
    collate_targets: Callable[[list[Any]], dict[str, Tensor]],
    collate_videos: Callable[[list[Any]], dict[str, Tensor]] | None = None,
) -> PackedBatch:
    """Pack `samples` into one batch; the functions turn a flat, non-empty list into tensors.

    Raises:
        ValueError: if a sample has another number of targets than texts.
        BadSample: if a text names another number of images than its sample has, or cannot be turned into tokens.
    """
    for s in samples:
        if len(s.targets) != len(s.texts):
            raise ValueError(f"sample {s.sample_id!r}: {len(s.texts)} texts but {len(s.targets)} targets")
    images = [image for s in samples for image in s.images]
    fresh = [image for image in images if not isinstance(image, StoredImage)]
    videos = [video for s in samples for video in s.videos]
    texts = [text for s in samples for text in with_images(s.texts, s.images, s.videos)]
    targets = [target for s in samples for target in s.targets]

    def owner(counts: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts, dtype=torch.int64))

    collated = collate_texts(texts) if texts else {}
    return PackedBatch(
        sample_id=[s.sample_id for s in samples],
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
        images=collate_images(fresh) if fresh else {},
        image_owner=owner([len(s.images) for s in samples]),
        texts=dict(collated),
        text_owner=owner([len(s.texts) for s in samples]),
        targets=collate_targets(targets) if targets else {},
        records=[s.record for s in samples],
        raw_texts=[t.text if isinstance(t, Described) else t for t in texts],
        bad=[s.bad for s in samples if s.bad is not None],
        changes=changes_of(collated, len(texts)),
        image_places=_places(samples),
        spellings=list(map(spelling_of, images)),
        videos=collate_videos(videos) if videos else {},
        video_owner=owner([len(s.videos) for s in samples]),
        video_times=[times for s in samples for times in s.times],
    )


def _places(samples: Sequence[Sample]) -> Tensor | None:
    """`PackedBatch.image_places`; None where no sample has a place."""
    if all(s.place is None for s in samples):
        return None
    rows = []
    for s in samples:
        place = s.place or Place(0, 0, 0)
        for number, image in enumerate(s.images):
            state = FRESH if not isinstance(image, StoredImage) else STORED if place.samples else DUMMY
            rows.append([state, place.shard, place.samples, place.sample, number])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


def changes_of(collated: Mapping[str, Tensor], texts: int) -> Tensor:
    """(T, 3) changes of that many collated texts; zeros where the backbone counts none."""
    return collated.changes if isinstance(collated, CollatedTexts) else torch.zeros(texts, 3, dtype=torch.int64)
