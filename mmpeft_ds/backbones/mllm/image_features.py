"""Features of images as a model's own `get_image_features` gives them, taken apart by image and put together again."""

# I images, n tokens of an image, d width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import on_host

# Fields of the output that differ by image, whether or not the language model reads them.
_OF_IMAGES = ("pooler_output", "deepstack_features", "last_hidden_state", "hidden_states", "attentions")


@dataclass
class ImageFeatures:
    """Features of I images behind the projector.

    Attributes:
        tokens: (n, d) of each image.
        parts: what the model gave for each image, in its own shape.
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
    def of(output: Any, runs_IR: Tensor | None) -> ImageFeatures:
        """Take apart what `get_image_features` returned.

        Args:
            output: with `pooler_output`, a tensor or one for each image.
            runs_IR: lengths of the runs of image tokens of each image, padded with zeros; None: each image is one run
                of as many as it has features, and one entry of the output.

        Raises:
            BadInput: if there are not as many features as the runs say.
        """
        pooled, deep = output.pooler_output, getattr(output, "deepstack_features", None)
        one_tensor = isinstance(pooled, Tensor)
        runs = None if runs_IR is None else [[n for n in row if n] for row in on_host(runs_IR).tolist()]
        if one_tensor:
            # Rows of all images, (N, d), or entries of equally many tokens, (E, n, d).
            per_entry = 1 if pooled.dim() == 2 else pooled.shape[1]
            counts = [1] * len(pooled) if runs is None else [sum(row) // per_entry for row in runs]
            if sum(counts) != len(pooled):
                raise _disagreement(runs, len(pooled) * per_entry)
            pooled = pooled.split(counts)
        parts = list(pooled)
        tokens = [part.reshape(-1, part.shape[-1]) for part in parts]
        found = [[len(t)] for t in tokens]
        if runs is not None and [sum(row) for row in runs] != [n for (n,) in found]:
            raise _disagreement(runs, sum(n for (n,) in found))
        deep = None if deep is None else [list(layer) for layer in deep]
        others = {name: value for name, value in vars(output).items() if name not in _OF_IMAGES}
        return ImageFeatures(tokens, parts, one_tensor, deep, found if runs is None else runs, others)

    def read_as(self, images: Sequence[int]) -> Any:
        """The output of `get_image_features` for these images, in this order."""
        parts: Any = [self.parts[i] for i in images]
        output = BaseModelOutputWithPooling(pooler_output=torch.cat(parts) if self.one_tensor else parts)
        deep = {} if self.deep is None else {"deepstack_features": [[layer[i] for i in images] for layer in self.deep]}
        for name, value in (self.others | deep).items():
            setattr(output, name, value)  # models hang fields of their own on it
        return output


def _disagreement(runs: list[list[int]] | None, features: int) -> BadInput:
    tokens = sum(map(sum, runs or []))
    return BadInput(
        f"backbone: the processor spells the images with {tokens} tokens, but the model makes {features} features of "
        "them. Settings such as image_seq_length, patch_size or downsampling differ between config.json and "
        "preprocessor_config.json or processor_config.json; take all files of one checkpoint."
    )
