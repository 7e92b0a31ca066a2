"""The contract of an image transform: from a decoded image, or stored features, to what a backbone collates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.formats import check_aspect
from mmpeft_ds.data.parsing import described, one_sample
from mmpeft_ds.data.video import Video
from mmpeft_ds.errors import BadSample


class ImageTransform:
    """Base of transforms that say more of themselves than a plain function can; it must survive pickling.

    A plain function (image, generator) -> anything is a transform as well, with these defaults: ask `hooks_of`.

    Attributes:
        takes_features: it gets the stored features of a sample, as one tensor, in place of pixels. Default: no.
        min_size: (height, width) that a decoder at reduced scale must not go below. Default: None, decode in full.
        takes_one_row: it takes exactly row `row(...)` of the stored features (rows, D) and changes nothing, so whole
            micro-batches may be read without calling it. Default: no.
    """

    takes_features = False
    min_size: Any = None
    takes_one_row = False

    def __call__(self, image: Tensor, generator: torch.Generator | None) -> Any:
        """The image as `collate_images` of the backbone takes it.

        Args:
            image: uint8 (3, H, W) RGB, or stored features.
            generator: seeded per sample and epoch; None outside training.

        Raises:
            BadSample: if the sample cannot be used.
        """
        raise NotImplementedError

    def row(self, rows: int, seed: int) -> int:
        """Index of the stored row that a sample takes.

        Args:
            seed: of the sample's random choices; of an array of seeds the result is an array.
        """
        raise NotImplementedError


_DEFAULTS = ImageTransform()


def apply(transform: Callable[..., Any], medium: Tensor | Video, generator: torch.Generator | None = None) -> Any:
    """The transformed image or video; whatever the transform refuses is a bad sample.

    Raises:
        BadSample: `aspect` for a strip that would be huge once scaled, `image` or `videos` for what the transform
            refuses, and as `parsing.one_sample`.
    """
    is_video = isinstance(medium, Video)
    if is_video or (medium.dim() == 3 and not hooks_of(transform).takes_features):
        check_aspect(*(medium.frames if is_video else medium).shape[-2:])
    with one_sample():
        try:
            return transform(medium) if is_video else transform(medium, generator)
        except (ValueError, TypeError, ArithmeticError, LookupError, OSError) as error:
            kind, what = ("videos", "video") if is_video else ("image", "image")
            raise BadSample(kind, f"refused by the {what} transform: {described(error)}") from error


def hooks_of(transform: Callable[..., Any]) -> ImageTransform:
    """`transform` itself if it is an `ImageTransform`, else the defaults for a plain function."""
    return transform if isinstance(transform, ImageTransform) else _DEFAULTS
