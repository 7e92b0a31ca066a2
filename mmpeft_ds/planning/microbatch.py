"""A micro-batch as large as a recipe allows: every text at its limit, every slot with its images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.errors import BadInput

PHOTOGRAPH = (480, 640)  # height and width that COCO's pictures have, for models that take pictures as they are


@dataclass(frozen=True)
class Filling:
    """What a sample is taken to hold.

    Attributes:
        images, texts: of each sample.
        image_size: (height, width) before the backbone's transform.
        words: of each text, and of the answer where it has one; 0: as many as the backbone keeps.
    """

    images: int = 1
    texts: int = 1
    image_size: tuple[int, int] = PHOTOGRAPH
    words: int = 0


def fill(backbone: Any, task: Any, samples: int, filling: Filling) -> PackedBatch:
    """A packed batch of that many equal samples of weight 1, on the CPU.

    Raises:
        BadInput: where the backbone takes stored features in the place of pictures.
    """
    transform = backbone.image_transform(False)
    if "image" in backbone.modalities and hooks_of(transform).takes_features:
        raise BadInput(
            "backbone: it reads stored features, so that no tower runs and less than a gigabyte is needed. "
            "There is nothing to plan: use ds_configs/zero1.json."
        )
    images = []
    if "image" in backbone.modalities:
        picture = torch.zeros(3, *filling.image_size, dtype=torch.uint8)
        images = [transform(picture, torch.Generator().manual_seed(0))] * filling.images
    text = _longest(backbone, filling.words)
    slot = Sample(weight=1.0, images=images, texts=[text] * filling.texts)
    slot.targets = [task.dummy_target() for _ in slot.texts]
    slots = [dataclasses.replace(slot, sample_id=f"planned/{i}") for i in range(samples)]
    return pack(slots, backbone.collate_images, backbone.collate_texts, task.collate)


def _longest(backbone: Any, words: int) -> str | Prompted:
    """A text that reaches the limits of the backbone, or has so many words in each of its parts."""
    prompt, target = (words or getattr(backbone.options, name, 0) or 32 for name in _limits(backbone))
    if not (backbone.generates or backbone.ranks_answers):
        return " ".join(["a"] * prompt)
    # Half of what a conversation may hold is question: what is over the limit is cut from it.
    return Prompted(" ".join(["a"] * prompt), " ".join(["a"] * (target if words else max(1, target // 2))))


def _limits(backbone: Any) -> tuple[str, str]:
    return backbone.prompt_limit, backbone.target_limit
