"""Packed batches: every sample is a slot that owns any number of images and texts.

Several questions about an image, two images per question, video frames, samples of text alone, and slots without a
sample (padding and bad samples, of weight 0) are one case. A frozen tower runs once per image, however many texts
belong to it.
"""

# S slots of this rank's micro-batch, I images, T texts, L text length

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpeft_ds.errors import BadSample
from mmpeft_ds.host_copies import both, to_device

if TYPE_CHECKING:
    from mmpeft_ds.ops.token_scores import TokenScores

IMAGE_MARK = "<image>"


@dataclass(frozen=True)
class Prompted:
    """A text in two parts, for generative models.

    Attributes:
        prompt: text that the model reads; it is not part of the loss.
        target: text that it should generate; empty if unknown.
        turns: earlier turns of a conversation, as (role, text), with roles `system`, `user` and `assistant`. Those of
            the assistant enter the loss as `target` does.
        images: number of images of the sample, set by packing. IMAGE_MARK in prompt and turns stands for one image
            each, in their order; without any mark the images come first.
        spellings: what the text says in the place of each image, where the image decides (`SpelledImage`), set by
            packing; empty: one mark of the model's.
    """

    prompt: str
    target: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    images: int | None = None
    spellings: tuple[str, ...] = ()

    def with_images(self, images: int, spellings: tuple[str, ...] = ()) -> Prompted:
        """A copy for a sample of that many images. Raises BadSample if its texts name another number of them."""
        named = self.marks
        if named not in (0, images):
            raise BadSample("images", f"the text names {IMAGE_MARK} {named} times, but the sample has {images} images")
        return dataclasses.replace(self, images=images, spellings=spellings)

    @property
    def marks(self) -> int:
        """Number of marks for images in its texts."""
        return sum(text.count(IMAGE_MARK) for text in (self.prompt, *(text for _, text in self.turns)))


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


class SpelledImage(dict[str, Tensor]):
    """What an image transform makes of an image whose content or size decides how the text spells it.

    Attributes:
        spelling: text that stands for the image in that of a language model.
    """

    def __init__(self, tensors: Mapping[str, Tensor], spelling: str):
        super().__init__(tensors)
        self.spelling = spelling

    def __reduce__(self) -> Any:
        return SpelledImage, (dict(self), self.spelling)


class CollatedTexts(dict[str, Tensor]):
    """Forward arguments of the text side, as `collate_texts` returns them, with counts of what is not as in the texts.

    Attributes:
        changes: (T, 3) int64: tokens cut from the prompt, tokens cut from the target, control tokens read as words.
    """

    def __init__(self, tensors: Mapping[str, Tensor], changes: Tensor):
        super().__init__(tensors)
        self.changes = changes


@dataclass
class GenerationOutput:
    """Outputs of a generative model for the T texts of a batch; made by `Backbone.read`, read by tasks.

    Attributes:
        logits: (T, S, V); position s predicts `labels[:, s]`, with the shift of the model family undone. None where
            `scores` stand in their place.
        labels: (T, S) int64 token ids, -100 at positions without loss.
        generated: T strings, in the evaluation of a task with `generation`.
        as_generated: `BackboneBase.as_generated`, beside `generated`.
        scores: of the labels, where `engine.assembly.forward` was asked for them.
        tie: zero that depends on what no text reads, so that all ranks reach the same towers in backward.
        text_of: (1, S) the text of each position, where all T texts stand in one row; the first dimension of logits,
            labels and scores is then 1. None: each has a row of its own.
        texts: T, with `text_of`.
        lengths, positions: (T,) tokens of each text as the model read it, image tokens included, and the number of
            positions that it computed for them, padding included; None and 0 where the collated texts say it.
    """

    logits: Tensor | None
    labels: Tensor
    generated: list[str] | None = None
    as_generated: Callable[[str], str | None] | None = None
    scores: TokenScores | None = None
    tie: Tensor | None = None
    text_of: Tensor | None = None
    texts: int = 0
    lengths: Tensor | None = None
    positions: int = 0

    def token_losses(self, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """(T,) negative log-likelihood, summed over the tokens with loss, at least float32; and (T,) their number."""
        if self.scores is not None:
            losses = self.scores.losses(smoothing)
        else:
            logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
            losses = cross_entropy(logits.transpose(1, 2), self.labels, reduction="none", label_smoothing=smoothing)
        total = self._of_texts(losses)
        return total if self.tie is None else total + self.tie, self._of_texts((self.labels != -100).long())

    def tokens_right(self) -> Tensor:
        """(T,) number of labels that are the most likely token."""
        right = self.logits.argmax(-1) == self.labels if self.scores is None else self.scores.right
        return self._of_texts((right & (self.labels != -100)).long())

    def _of_texts(self, values: Tensor) -> Tensor:
        """(T,) sums of what stands at the positions of each text."""
        if self.text_of is None:
            return values.sum(1)
        return values.new_zeros(self.texts).index_add(0, self.text_of[0], values[0])

    def spelled_as(self, generated: str, references: Sequence[str]) -> str:
        """A generated text as the references spell it, where it is one of them to the model's tokenizer.

        Tokenizers drop spaces, case or accents, so that a model cannot generate some references to the letter. Texts
        that are the same to the tokenizer become the same here, and no others.

        Returns:
            the most frequent of the references that it equals; the text itself if it equals none.
        """
        if self.as_generated is None:
            return generated
        equal = [text for text in references if self.as_generated(text) == generated]
        return max(equal, key=equal.count) if equal else generated


@dataclass
class Sample:
    """One decoded slot, before packing.

    Attributes:
        sample_id: `dataset/key` as the manifest names it; empty for padding.
        weight: 1 for a good sample, 0 for padding, a bad sample or a dummy.
        images: results of the backbone's image transform, in order.
        texts: strings, `Prompted` for generative models, or `Described` where features are stored.
        targets: one task-defined target per text.
        record: the sample's JSON, for metrics and the page of predictions.
        bad: (kind, shard, key) if the sample could not be used.
    """

    sample_id: str = ""
    weight: float = 0.0
    images: list[Any] = field(default_factory=list)
    texts: list[str | Prompted | Described] = field(default_factory=list)
    targets: list[Any] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    bad: tuple[str, str, str] | None = None


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
        padding_free: a language model is to read all texts as one row, one behind the other and each by itself. Here
            they are padded as ever; the backbone makes the row, since it knows how many tokens an image becomes.
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

    @property
    def modalities(self) -> frozenset[str]:
        """Those of `image` and `text` of which this micro-batch has any."""
        present = {"image": len(self.image_owner), "text": len(self.text_owner)}
        return frozenset(name for name, count in present.items() if count)

    @property
    def text_weight(self) -> Tensor:
        """(T,) weight of the slot that owns each text."""
        return both(lambda weight, owner: weight[owner], self.weight, self.text_owner)

    def changed_texts(self) -> list[int]:
        """How many texts of weight > 0 have a cut prompt, a cut target, and control tokens that are read as words."""
        if self.changes is None:
            return [0, 0, 0]
        return ((self.changes > 0) & (self.text_weight > 0)[:, None]).sum(0).tolist()

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """A copy with its tensors on `device`, of which whole numbers and weights are still known here.

        See `host_copies.on_host`.
        """
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


def with_images(texts: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """`texts` of a sample with these transformed images, which are set in `Prompted` ones. Raises BadSample."""
    spellings = tuple(image.spelling for image in images if isinstance(image, SpelledImage))
    return [
        t.with_images(len(images), spellings) if isinstance(t, Prompted) and t.images is None else t for t in texts
    ]


def check_images(number: int, most: int) -> None:
    """Raise BadSample if a sample has more images than a model takes; `most` 0 is any number."""
    if 0 < most < number:
        raise BadSample("images", f"{number} images, but the model tells {most} apart at most")


def pack(
    samples: Sequence[Sample],
    collate_images: Callable[[list[Any]], dict[str, Tensor]],
    collate_texts: Callable[[list[Any]], dict[str, Tensor]],
    collate_targets: Callable[[list[Any]], dict[str, Tensor]],
) -> PackedBatch:
    """Pack `samples` into one batch; the three functions turn a flat, non-empty list into tensors.

    Raises:
        ValueError: if a sample has another number of targets than texts.
        BadSample: if a text names another number of images than its sample has, or cannot be turned into tokens.
    """
    for s in samples:
        if len(s.targets) != len(s.texts):
            raise ValueError(f"sample {s.sample_id!r}: {len(s.texts)} texts but {len(s.targets)} targets")
    images = [image for s in samples for image in s.images]
    texts = [text for s in samples for text in with_images(s.texts, s.images)]
    targets = [target for s in samples for target in s.targets]

    def owner(counts: list[int]) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts, dtype=torch.int64))

    collated = collate_texts(texts) if texts else {}
    return PackedBatch(
        sample_id=[s.sample_id for s in samples],
        weight=torch.tensor([s.weight for s in samples], dtype=torch.float32),
        images=collate_images(images) if images else {},
        image_owner=owner([len(s.images) for s in samples]),
        texts=dict(collated),
        text_owner=owner([len(s.texts) for s in samples]),
        targets=collate_targets(targets) if targets else {},
        records=[s.record for s in samples],
        raw_texts=[t.text if isinstance(t, Described) else t for t in texts],
        bad=[s.bad for s in samples if s.bad is not None],
        changes=changes_of(collated, len(texts)),
    )


def changes_of(collated: Mapping[str, Tensor], texts: int) -> Tensor:
    """(T, 3) changes of that many collated texts; zeros where the backbone counts none."""
    return collated.changes if isinstance(collated, CollatedTexts) else torch.zeros(texts, 3, dtype=torch.int64)
