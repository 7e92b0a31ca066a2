"""How many tokens an image of some size becomes, without its pixels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS
from mmpeft_ds.data.batch import SpelledImage


class ImageTokens:
    """(height, width) -> number of tokens, and the spelling where the processor gives one, else an empty text.

    As the image processor and the model themselves have it: a black image goes through the processor, and what comes
    out says the number, or the model without storage does.

    Args:
        transform: of images, as the backbone's `image_transform` gives it.
        collate: its `collate_images`.
        merge: patches along a side that become one token, where the processor gives grids of patches.
        build: the model on the meta device; called when it is needed, at most once.
    """

    def __init__(
        self,
        transform: Callable[[Tensor, Any], Any],
        collate: Callable[[list[Any]], dict[str, Tensor]],
        merge: int,
        build: Callable[[], PreTrainedModel],
    ):
        self._transform, self._collate, self._merge, self._build = transform, collate, merge, build
        self._by_size: dict[tuple[int, int], tuple[int, str]] = {}
        self._by_shape: dict[tuple, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes build the model for themselves; its class is made at run time and does not pickle.
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def __call__(self, height: int, width: int) -> tuple[int, str]:
        if (height, width) not in self._by_size:
            image = self._transform(torch.zeros(3, height, width, dtype=torch.uint8), None)
            if isinstance(image, SpelledImage):
                self._by_size[height, width] = int(image[TOKEN_RUNS].sum()), image.spelling
            else:
                self._by_size[height, width] = self._of(self._collate([image])), ""
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
    def relative_cost(self) -> float:
        """Cost of a token of an image in the vision tower, over that of a token in the language model: by their
        weights, the one forward for each patch, the other forward and backward to its inputs."""
        text, whole = (sum(p.numel() for p in m.parameters()) for m in (self._model.get_decoder(), self._model.model))
        return (whole - text) * self._merge**2 / (2 * text)

    @functools.cached_property
    def _model(self) -> PreTrainedModel:
        return self._build()
