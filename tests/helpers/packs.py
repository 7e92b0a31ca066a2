"""Samples of tests as a packed batch."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.batch import PackedBatch, Sample, pack


def packed(
    backbone: BackboneBase,
    image: Callable[[Any], Tensor],
    samples: Sequence[tuple[Sequence[Any], Sequence[Any]]],
    targets: Callable[[list[int]], dict[str, Tensor]] = lambda targets: {},
    train: bool = False,
) -> PackedBatch:
    """A batch of samples of weight 1, numbered from 0.

    Args:
        image: makes an image of what a sample names.
        samples: for each, what its images are made of, and its texts.
        targets: collates a 0 for every text.
        train: the image transform is that of training.
    """
    transform = backbone.image_transform(train)
    given = [
        Sample(str(i), 1.0, [transform(image(n), None) for n in images], list(texts), [0] * len(texts))
        for i, (images, texts) in enumerate(samples)
    ]
    return pack(given, backbone.collate_images, backbone.collate_texts, targets)
