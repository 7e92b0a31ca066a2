"""Features of images and videos as a model's own `get_image_features` and `get_video_features` give them, taken apart
by image or video and put together again."""

# I images or videos, n tokens of one, d width

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import on_host

# Names of an image's features where they stand apart: its part of the one tensor of the model, or of its list, and
# those of further layers.
ROWS, PART, DEEP = "rows", "part", "deep."
# Fields of the output that differ by image, whether or not the language model reads them.
_OF_IMAGES = ("pooler_output", "deepstack_features", "last_hidden_state", "hidden_states", "attentions")


@dataclass
class ImageFeatures:
    """Features of I images, or videos, after the projector.

    Attributes:
        tokens: (n, d) of each image.
        parts: what the model gave for each image, in its own shape, without padding.
        one_tensor: the model takes the parts in one tensor, else as a list.
        deep: of each layer of the language model that reads further features, (n, d) of each image.
        runs: lengths of the runs of image tokens that each image is in a text; together its n.
        others: fields of the output that are the same for all images.
    """

    tokens: list[Tensor]
    parts: list[Tensor]
    one_tensor: bool = False
    deep: list[list[Tensor]] | None = None
    runs: list[list[int]] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(output: Any, runs_IR: Tensor | None, cut: Callable[[Tensor, int], Tensor] | None = None) -> ImageFeatures:
        """Take apart what `get_image_features` returned.

        Args:
            output: with `pooler_output`, a tensor or one for each image.
            runs_IR: lengths of the runs of image tokens of each image, padded with zeros; None: each image is one run
                of as many as it has features, and one entry of the output.
            cut: takes the padding out of an entry (n, d) of which so many are features; None: there is no padding.

        Raises:
            BadInput: if there are not as many features as the runs say.
        """
        pooled, deep = output.pooler_output, getattr(output, "deepstack_features", None)
        one_tensor = isinstance(pooled, Tensor)
        runs = None if runs_IR is None else [[n for n in row if n] for row in on_host(runs_IR).tolist()]
        if cut is not None and runs is not None and one_tensor and pooled.dim() == 3 and len(pooled) == len(runs):
            pooled = torch.cat([cut(entry, sum(row)) for entry, row in zip(pooled, runs, strict=True)])
        if one_tensor:
            # Rows of all images, (N, d), or entries of equally many tokens, (E, n, d).
            per_entry = 1 if pooled.dim() == 2 else pooled.shape[1]
            counts = [1] * len(pooled) if runs is None else [sum(row) // per_entry for row in runs]
            if sum(counts) != len(pooled):
                raise _disagreement(runs, len(pooled) * per_entry)
            pooled = pooled.split(counts)
        parts = list(pooled)
        if runs is not None and len(parts) > len(runs):
            parts = _joined(parts, [sum(row) for row in runs])
        tokens = [part.reshape(-1, part.shape[-1]) for part in parts]
        run_lengths = [[len(t)] for t in tokens]
        if runs is not None and [sum(row) for row in runs] != [n for (n,) in run_lengths]:
            raise _disagreement(runs, sum(n for (n,) in run_lengths))
        deep = None if deep is None else [list(layer) for layer in deep]
        others = {name: value for name, value in vars(output).items() if name not in _OF_IMAGES}
        return ImageFeatures(tokens, parts, one_tensor, deep, run_lengths if runs is None else runs, others)

    def values(self, image: int) -> dict[str, Tensor]:
        """The features of one image by name, from which `together` makes these again. Raises BadInput."""
        if strange := [name for name, value in self.others.items() if value is not None]:
            raise BadInput(
                f"engine.cache_frozen: this family's image features come with {strange[0]}, which is not kept. "
                "Leave it out."
            )
        deep = {f"{DEEP}{k}": layer[image] for k, layer in enumerate(self.deep or [])}
        return {ROWS if self.one_tensor else PART: self.parts[image], **deep}

    @staticmethod
    def together(images: dict[str, Tensor], runs_IR: Tensor | None) -> ImageFeatures | None:
        """The `values` of all images in one mapping, each name prefixed with the image's number and a dot; None where
        there are none."""
        one_tensor = f"0.{ROWS}" in images
        kind = ROWS if one_tensor else PART
        count = sum(key.endswith(f".{kind}") for key in images)
        if not count:
            return None
        parts = [images[f"{i}.{kind}"] for i in range(count)]
        tokens = [part.reshape(-1, part.shape[-1]) for part in parts]
        layers = sum(key.startswith(f"0.{DEEP}") for key in images)
        deep = [[images[f"{i}.{DEEP}{k}"] for i in range(count)] for k in range(layers)] or None
        runs = [[len(t)] for t in tokens]
        if runs_IR is not None:
            runs = [[n for n in row if n] for row in on_host(runs_IR).tolist()]
        return ImageFeatures(tokens, parts, one_tensor, deep, runs)

    def read_as(self, images: Sequence[int]) -> Any:
        """The output of `get_image_features` for these images, in this order."""
        parts: Any = [self.parts[i] for i in images]
        output = BaseModelOutputWithPooling(pooler_output=torch.cat(parts) if self.one_tensor else parts)
        deep = {} if self.deep is None else {"deepstack_features": [[layer[i] for i in images] for layer in self.deep]}
        for name, value in (self.others | deep).items():
            setattr(output, name, value)  # models hang fields of their own on it
        return output


class Outputs(dict[str, Any]):
    """The model's argument `mm_encoder_outputs`, which can be had for several sequences of each text.

    Args:
        make: the argument for numbers of images and videos in the order in which texts read them.
        media: these numbers.
        by_text: the same by text.
    """

    def __init__(
        self, make: Callable[[list[int]], dict[str, Any]], media: list[int], by_text: Callable[[], list[list[int]]]
    ):
        super().__init__(make(media))
        self._make, self._by_text = make, by_text

    def repeated(self, times: int) -> dict[str, Any]:
        """For `times` sequences of each text, one after the other: all images of a text, and then all again."""
        return self._make([i for text in self._by_text() for i in text * times])


def is_part(name: str) -> bool:
    """Whether a value of an image is of its features."""
    return name in (ROWS, PART) or name.startswith(DEEP)


def _joined(tiles: list[Tensor], wanted: list[int]) -> list[Tensor]:
    """One tensor for each image of the tensors (n, d) of its tiles; `wanted` says how many features an image has."""
    ends = list(itertools.accumulate(map(len, tiles)))
    parts, first = [], 0
    for end in itertools.accumulate(wanted):
        if end not in ends:
            raise _disagreement([wanted], ends[-1])
        last = ends.index(end) + 1
        parts.append(torch.cat(tiles[first:last]))
        first = last
    return parts


def _disagreement(runs: list[list[int]] | None, features: int) -> BadInput:
    tokens = sum(map(sum, runs or []))
    return BadInput(
        f"backbone: the processor spells the images with {tokens} tokens, but the model makes {features} features of "
        "them. Settings such as image_seq_length, patch_size or downsampling differ between config.json and "
        "preprocessor_config.json or processor_config.json; take all files of one checkpoint."
    )


@dataclass
class MediaFeatures:
    """Features of all images of a batch and of all its videos, numbered in this order.

    Attributes:
        images, videos: of each kind.
        apart: those of videos stand elsewhere in the texts than those of images.
    """

    images: ImageFeatures
    videos: ImageFeatures
    apart: bool

    def __len__(self) -> int:
        return len(self.images) + len(self.videos)

    @property
    def tokens(self) -> list[Tensor]:
        """(n, d) of each."""
        return self.images.tokens + self.videos.tokens

    @property
    def runs(self) -> list[list[int]]:
        """Numbers of tokens of each in the text."""
        return self.images.runs + self.videos.runs

    def read_as(self, media: Sequence[int]) -> dict[str, Any]:
        """The model's argument `mm_encoder_outputs` for these, in this order."""
        of_images = [i for i in media if i < len(self.images)]
        of_videos = [i - len(self.images) for i in media if i >= len(self.images)]
        if self.apart or not of_images or not of_videos:
            pairs = (("image", self.images, of_images), ("video" if self.apart else "image", self.videos, of_videos))
            return {name: features.read_as(chosen) for name, features, chosen in pairs if chosen}
        return {"image": self._joined().read_as(media)}

    def by_text(self, media: Sequence[int], tokens: Sequence[int]) -> list[list[int]]:
        """`media`, as all texts read them one after the other, by text; `tokens` of them stand in each text."""
        left, texts = iter(media), []
        for missing in tokens:
            own: list[int] = []
            while missing > 0:
                own.append(next(left))
                missing -= sum(self.runs[own[-1]])
            texts.append(own)
        return texts

    def _joined(self) -> ImageFeatures:
        """Images and videos as if all were images."""
        a, b = self.images, self.videos
        deep = None if a.deep is None else [x + y for x, y in zip(a.deep, b.deep, strict=True)]
        return ImageFeatures(
            a.tokens + b.tokens, a.parts + b.parts, a.one_tensor, deep, a.runs + b.runs, a.others | b.others
        )
