"""Number of tokens of an image or a video, from its size alone, and whose image each run of tokens is."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmpeft_ds.backbones.mllm.costs import patches_of
from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS
from mmpeft_ds.data.batch import Spelled
from mmpeft_ds.data.video import Times, Video
from mmpeft_ds.host_copies import on_host

KEPT = 4096  # videos whose numbers are kept; nearly every video of a data set has times of its own


class ImageSize(NamedTuple):
    """Tokens and patches of an image of some size.

    Attributes:
        tokens: of the language model.
        spelling: in the text, where the processor gives one, else empty.
        patches, patch_pairs: see `TokenCounts`.
    """

    tokens: int
    spelling: str
    patches: int
    patch_pairs: int


class ImageTokens:
    """(height, width) -> `ImageSize`.

    As the image processor and the model themselves have it: a black image goes through the processor, and what comes
    out says the number, or the model without storage does.

    Args:
        transform: of images, as the backbone's `image_transform` gives it.
        collate: its `collate_images`.
        merge: patches along a side that become one token, where the processor gives grids of patches.
        patch: side of a patch.
        build: the model on the meta device; called when it is needed, at most once.
    """

    def __init__(
        self,
        transform: Callable[[Tensor, Any], Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        merge: int,
        patch: int,
        build: Callable[[], PreTrainedModel],
    ):
        self._transform, self._collate, self._merge, self._patch, self._build = transform, collate, merge, patch, build
        self._by_size: dict[tuple[int, int], ImageSize] = {}
        self._by_shape: dict[tuple, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes build the model for themselves; its class is made at run time and does not pickle.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def __call__(self, height: int, width: int) -> ImageSize:
        if (height, width) not in self._by_size:
            image = self._transform(torch.zeros(3, height, width, dtype=torch.uint8), None)
            if isinstance(image, Spelled):
                size_in_text = int(image[TOKEN_RUNS].sum()), image.spelling
            else:
                size_in_text = self._of(self._collate([image])), ""
            self._by_size[height, width] = ImageSize(*size_in_text, *patches_of(image, self._patch))
        return self._by_size[height, width]

    def check(self, image: Any) -> None:
        """Compare the tokens in the spelling of an image with the features that the model makes of it.

        Args:
            image: as the transform gives it.

        Raises:
            BadInput: if their numbers differ. A model whose number follows from values, such as grids, is not tried.
        """
        collated = self._collate([image])
        given = {n: v.to("meta") if n.startswith("pixel") else v for n, v in collated.items()}
        with contextlib.suppress(RuntimeError):  # it reads values, which the meta device has none of
            self._model.image_features(given)

    def _of(self, image: dict[str, Tensor]) -> int:
        if "image_grid_thw" in image:
            return int(image["image_grid_thw"].prod()) // self._merge**2
        sizes = {name: value for name, value in image.items() if name != "pixel_values"}
        shape = (tuple(image["pixel_values"].shape), *(tuple(v.flatten().tolist()) for v in sizes.values()))
        if shape not in self._by_shape:
            pixels = image["pixel_values"].to("meta")
            self._by_shape[shape] = len(self._model.image_features({"pixel_values": pixels, **sizes}).tokens[0])
        return self._by_shape[shape]

    @functools.cached_property
    def _model(self) -> PreTrainedModel:
        return self._build()


class VideoTokens:
    """(height, width, times) -> `ImageSize` of a video: a black one goes through the processor.

    Args:
        transform: of videos, as the backbone's `video_transform` gives it.
        patch: side of a patch.
    """

    def __init__(self, transform: Callable[[Video], Any], patch: int):
        self._transform, self._patch = transform, patch
        self._counted: OrderedDict[tuple[int, int, Times], ImageSize] = OrderedDict()

    def __call__(self, height: int, width: int, times: Times) -> ImageSize:
        key = height, width, times
        if key not in self._counted:
            if len(self._counted) >= KEPT:
                self._counted.popitem(last=False)
            self._counted[key] = self._of(*key)
        return self._counted[key]

    def _of(self, height: int, width: int, times: Times) -> ImageSize:
        """Frames, or pairs of them, are taken to be read apart."""
        video = self._transform(Video(torch.zeros(len(times.of_frames), 3, height, width, dtype=torch.uint8), times))
        patches, pairs = patches_of(video, self._patch)
        apart = int(video["video_grid_thw"][0, 0]) if "video_grid_thw" in video else 1
        return ImageSize(int(video[TOKEN_RUNS].sum()), video.spelling, patches, pairs // apart)


def owned_by_slot(owner: Tensor) -> dict[int, list[int]]:
    """Numbers of the images, or videos, of each slot that has any."""
    owned: dict[int, list[int]] = {}
    for number, slot in enumerate(on_host(owner).tolist()):
        owned.setdefault(slot, []).append(number)
    return owned


def number_of_runs(media: dict[str, Tensor], number: int) -> list[int]:
    """Number of token runs of each image or video; one unless stated."""
    runs = media.get(TOKEN_RUNS)
    return [1] * number if runs is None else (on_host(runs) > 0).sum(1).tolist()
