"""Dummy slots for missing modalities, so that all ranks run the same towers in every micro-step.

A rank whose micro-batch has no image would skip the vision tower. The others would then wait for ever: under ZeRO-3 in
a gather, under ZeRO-1 and 2 in a gradient reduction. So a rank that lacks a modality which another rank has gets one
slot of it with weight 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch, Sample, pack

MODALITIES = ("image", "text")


def present(batch: PackedBatch) -> list[float]:
    """Per entry of MODALITIES: 1 if this micro-batch has it, else 0. Its sum over ranks says how many have it."""
    return [float(name in batch.modalities) for name in MODALITIES]


def complete(batch: PackedBatch, anywhere: list[float], backbone: Any, task: Any) -> PackedBatch:
    """`batch`, or a copy with a weight-0 slot that owns every modality which some rank has and this one lacks.

    Where no rank has anything, the slot owns one of everything.

    Args:
        batch: micro-batch of this rank.
        anywhere: `present` summed over ranks.
        backbone, task: make the dummy and pack it as they pack real samples.
    """
    wanted = {name for name, count in zip(MODALITIES, anywhere, strict=True) if count}
    if not wanted & {"text"}:
        # All ranks have padding, bad samples or images without texts alone. The micro-step counts all the same, and a
        # forward needs a text.
        wanted = set(backbone.modalities)
    missing = wanted - batch.modalities
    if not missing:
        return batch
    # Give the slot a text whenever any rank has texts. Through it the loss, times 0, reaches the tower, so that its
    # trainable parameters get a gradient (of zeros) as on the other ranks.
    slot = Sample()
    if "image" in missing:
        transform = backbone.image_transform(False)
        slot.images = [transform(backbone.dummy("image"), torch.Generator().manual_seed(0))]
    if "text" in wanted:
        slot.texts, slot.targets = [backbone.dummy("text")], [task.dummy_target()]
    dummy = pack([slot], backbone.collate_images, backbone.collate_texts, task.collate)
    slots = len(batch.sample_id)
    return dataclasses.replace(
        batch,
        sample_id=batch.sample_id + dummy.sample_id,
        weight=torch.cat([batch.weight, dummy.weight]),
        images=dummy.images or batch.images,
        image_owner=torch.cat([batch.image_owner, dummy.image_owner + slots]),
        texts=_append(batch.texts, dummy.texts),
        text_owner=torch.cat([batch.text_owner, dummy.text_owner + slots]),
        targets=_append(batch.targets, dummy.targets),
        records=batch.records + dummy.records,
        raw_texts=batch.raw_texts + dummy.raw_texts,
        changes=None if batch.changes is None else torch.cat([batch.changes, torch.zeros_like(dummy.changes)]),
    )


def _append(rows: dict[str, Tensor], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of both. `extra`, whose values do not count, is cropped or padded with zeros to the widths of the other."""
    if not rows or not extra:
        return rows or extra
    return {name: torch.cat([rows[name], _fit(extra[name], rows[name])]) for name in rows}


def _fit(extra: Tensor, like: Tensor) -> Tensor:
    fitted = like.new_zeros((len(extra), *like.shape[1:]))
    window = tuple(slice(0, min(a, b)) for a, b in zip(extra.shape, fitted.shape, strict=True))
    fitted[window] = extra[window].to(like.dtype)
    return fitted
