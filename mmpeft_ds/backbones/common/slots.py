"""Counting the images of the slots of a packed batch, without waiting for the device."""

# S slots, I images

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.host_copies import on_host


def images_per_slot(image_owner: Tensor, slots: int) -> Tensor:
    """(S,) int64 number of images that each slot owns; `torch.bincount` would wait for a GPU."""
    return image_owner.new_zeros(slots).index_add(0, image_owner, torch.ones_like(image_owner))


def most_images(image_owner: Tensor) -> int:
    """Images of the slot that has most; 0 without images."""
    return int(on_host(image_owner).bincount().max()) if len(image_owner) else 0
