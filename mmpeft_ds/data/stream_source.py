"""What a stream reads: one split of a data set, and the functions that make its samples and batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.shards import Stamp
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.data.video import Video


@dataclass
class StreamSource:
    """One split of a data set, and the functions that read its samples. With workers, these must pickle.

    Attributes:
        manifest: of the data set; sample ids are `manifest.name/key`.
        split: of the data set.
        read: (record, torch.Generator) -> texts and one target per text; raises BadSample.
        image_transform: (uint8 (3, H, W), torch.Generator) -> what `collate_images` takes; a plain function, or a
            `data.transform.ImageTransform`. Where it takes features it gets the sample's array, one image, or the
            arrays along its first of three dimensions.
        collate_images, collate_texts, collate_targets: non-empty flat list -> tensors, see `data.batch.pack`.
        collates_by_row: `collate_targets` gives each target rows of its own, whatever others come with it, so that the
            rows of many are collated once and kept.
        fields: json fields that every record must have.
        weight: relative share of the steps.
        subset: the samples to use; None: all of the split.
        video_transform, collate_videos: the same for videos, from a `data.video.Video` on; None: frames are read as
            images.
        most_images: of a sample, 0 = any number.
        collate_apart: takes the place of `collate_images` where values of images are kept (`Stream.keep_frozen`).
        stamps: of all shards when the run began, see `data.shards.stamp`; empty: not known.
        loss_weight: micro-batch -> its weight in the loss, for `PackedBatch.counts`; None: nobody counts.
        identify: give each record the identity of its images (of its stored features, where it has them) under
            `PICTURE`, unless it brings one.
    """

    manifest: Manifest
    split: str
    read: Callable[[dict[str, Any], torch.Generator], tuple[list[str], list[Any]]]
    image_transform: Callable[[Tensor, torch.Generator], Any]
    collate_images: Callable[[list[Any]], dict[str, Tensor]]
    collate_texts: Callable[[list[str]], dict[str, Tensor]]
    collate_targets: Callable[[list[Any]], dict[str, Tensor]]
    fields: Sequence[str] = ()
    weight: float = 1.0
    subset: Subset | None = None
    most_images: int = 0
    identify: bool = False
    stamps: Sequence[Stamp] = ()
    collate_apart: Callable[[list[Any]], dict[str, Tensor]] | None = None
    video_transform: Callable[[Video], Any] | None = None
    collate_videos: Callable[[list[Any]], dict[str, Tensor]] | None = None
    loss_weight: Callable[[PackedBatch], float] | None = None
    collates_by_row: bool = False

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self.manifest.samples(self.split) if self.subset is None else len(self.subset)
