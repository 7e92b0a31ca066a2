"""Resizing of decoded images to the square input of a vision tower. Normalising is left to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import interpolate

from mmpeft_ds.data.transform import ImageTransform


@dataclass(frozen=True)
class SquareTransform(ImageTransform):
    """uint8 (3, H, W) -> uint8 (3, size, size), antialiased.

    Attributes:
        size: side of the result in pixels.
        fit: `stretch` ignores the aspect ratio; `crop` scales the shorter side to `size` and keeps the centre.
        resample: interpolation.
    """

    size: int
    fit: Literal["stretch", "crop"] = "stretch"
    resample: Literal["bilinear", "bicubic"] = "bicubic"

    @property
    def min_size(self) -> tuple[int, int]:
        """(height, width) that a decoder at reduced scale must not go below."""
        return self.size, self.size

    def __call__(self, image: Tensor, generator: Any = None) -> Tensor:
        if self.fit == "crop":
            height, width = image.shape[-2:]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            image = image[:, top : top + side, left : left + side]
        if image.shape[-2:] == (self.size, self.size):
            return image
        return interpolate(image[None], (self.size, self.size), mode=self.resample, antialias=True)[0]
