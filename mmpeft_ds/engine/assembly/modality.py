"""Dummy slots for missing modalities, so that all ranks run the same towers in every micro-step.

A rank whose micro-batch has no image would skip the vision tower. The others would then wait for ever: under ZeRO-3 in
a gather, under ZeRO-1 and 2 in a gradient reduction. So a rank that lacks a modality which another rank has gets one
slot of it with weight 0. Videos are a modality of their own, also where one tower sees both: it then runs once for all
images and once for all videos, on every rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import FRESH, PackedBatch, Sample, pack
from mmpeft_ds.data.frozen_store import Place, StoredImage
from mmpeft_ds.host_copies import on_host

MODALITIES = ("image", "text", "video")
WIDTH = len(MODALITIES) + 1  # of `present`


def present(batch: PackedBatch) -> list[float]:
    """Per entry of MODALITIES: 1 if this micro-batch has it, else 0; then the number of its images whose values are to
    be computed apart (`PackedBatch.image_places`). Its sum over ranks says how many have it."""
    places = batch.image_places
    fresh = 0 if places is None else int((on_host(places)[:, 0] == FRESH).sum())
    return [*(float(name in batch.modalities) for name in MODALITIES), float(fresh)]


def complete(batch: PackedBatch, anywhere: list[float], backbone: Any, task: Any, apart: bool = False) -> PackedBatch:
    """`batch`, or a copy with a weight-0 slot that owns every modality which some rank has and this one lacks.

    Where no rank has anything, the slot owns one of everything.

    Args:
        batch: micro-batch of this rank.
        anywhere: `present` summed over ranks.
        backbone, task: make the dummy and pack it as they pack real samples.
        apart: values of images are computed apart or stored; the dummy then needs none.
    """
    wanted = {name for name, count in zip(MODALITIES, anywhere, strict=False) if count}
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
    if "image" in missing and apart:
        slot.images, slot.place = [StoredImage()], Place(0, 0, 0)
    elif "image" in missing:
        transform = backbone.image_transform(False)
        slot.images = [transform(backbone.dummy("image"), torch.Generator().manual_seed(0))]
    if "video" in missing:
        slot.videos = [backbone.video_transform()(backbone.dummy("video"))]
    if "text" in wanted:
        slot.texts, slot.targets = [task.dummy_text(backbone.dummy("text"))], [task.dummy_target()]
    collate = (backbone.collate_images, backbone.collate_texts, task.collate, backbone.collate_videos)
    dummy = pack([slot], *collate)
    slots = len(batch.sample_id)
    return dataclasses.replace(
        batch,
        sample_id=batch.sample_id + dummy.sample_id,
        weight=torch.cat([batch.weight, dummy.weight]),
        images=dummy.images or batch.images,
        image_owner=torch.cat([batch.image_owner, dummy.image_owner + slots]),
        videos=dummy.videos or batch.videos,
        video_owner=torch.cat([batch.video_owner, dummy.video_owner + slots]),
        video_times=batch.video_times + dummy.video_times,
        texts=_append(_widened(batch.texts, dummy.texts) if dummy.videos else batch.texts, dummy.texts),
        text_owner=torch.cat([batch.text_owner, dummy.text_owner + slots]),
        targets=_append(batch.targets, dummy.targets),
        records=batch.records + dummy.records,
        raw_texts=batch.raw_texts + dummy.raw_texts,
        image_places=_both(batch.image_places, dummy.image_places),
        spellings=batch.spellings + dummy.spellings,
        changes=None if batch.changes is None else torch.cat([batch.changes, torch.zeros_like(dummy.changes)]),
    )


def _both(places: Tensor | None, extra: Tensor | None) -> Tensor | None:
    if places is None or extra is None:
        return extra if places is None else places
    return torch.cat([places, extra])


def _append(rows: dict[str, Tensor], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of both. `extra`, whose values do not count, is cropped or padded with zeros to the widths of the other."""
    if not rows or not extra:
        return rows or extra
    return {name: torch.cat([rows[name], _fit(extra[name], rows[name])]) for name in rows}


def _widened(rows: dict[str, Tensor], extra: dict[str, Tensor]) -> dict[str, Tensor]:
    """`rows` with padding up to the widths of `extra`, whose text names a video and must not be cut within it."""
    missing = {
        name: max(0, extra[name].shape[-1] - value.shape[-1]) for name, value in rows.items() if value.dim() > 1
    }
    fill = {"labels": -100}
    return rows | {n: torch.nn.functional.pad(rows[n], (0, k), value=fill.get(n, 0)) for n, k in missing.items()}


def _fit(extra: Tensor, like: Tensor) -> Tensor:
    fitted = like.new_zeros((len(extra), *like.shape[1:]))
    window = tuple(slice(0, min(a, b)) for a, b in zip(extra.shape, fitted.shape, strict=True))
    fitted[window] = extra[window].to(like.dtype)
    return fitted
