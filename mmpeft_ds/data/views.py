"""Augmented views of an image: a random crop of random aspect ratio, mirrored with probability 1/2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft_ds.data.decode import resize

TRIES = 10
RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class RandomView:
    """uint8 (3, H, W) -> a random crop of it, uint8, resized to `size` and mirrored with probability 1/2.

    Attributes:
        scale: smallest and largest share of the area that a crop covers.
        size: (height, width) of the result; None keeps the size of the crop.

    Source: the training transform of CoOp (arXiv 2109.01134) and Tip-Adapter (arXiv 2207.09519): random resized crop
    with area 0.08 to 1 and aspect ratio 3/4 to 4/3, and a horizontal flip.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    size: tuple[int, int] | None = None

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        top, left, height, width = crop_box(*image.shape[-2:], self.scale, generator)
        view = image[:, top : top + height, left : left + width]
        if self.size is not None:
            view = resize(view, self.size)
        return view.flip(-1) if torch.rand((), generator=generator) < 0.5 else view


def crop_box(
    height: int, width: int, scale: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; after ten tries the largest central one of an allowed ratio."""
    for _ in range(TRIES):
        share, ratio, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        # Uniform in the logarithm: 3/4 is as likely as 4/3.
        ratio = RATIO[0] * math.exp(ratio * math.log(RATIO[1] / RATIO[0]))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)
