"""HunYuan-VL: its processor takes an image only between the tokens that begin and end one, and its model numbers the
images of a whole batch, though those of a text count."""

# T texts, S text length, I images of all texts, A axes of positions

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmpeft_ds.backbones.mllm.families.base import Family


class HunYuanVL(Family):
    """Images between two tokens, numbered in each text."""

    model_types = ("hunyuan_vl",)
    unpackable = ""
    patches = model_types
    text_axis = False
    merges_each = True

    def alone(self, processor: Any) -> str:
        return processor.image_start_token + processor.image_token + processor.image_end_token

    def adjust(self, model: PreTrainedModel) -> None:
        model.model.get_rope_index = types.MethodType(_of_each_text, model.model)


def _of_each_text(
    self: PreTrainedModel,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """(A, T, S) positions and (T, 1) differences to the text's length, as the stock function makes them of each text
    with its own of the (I, 3) grids."""
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    whole, made, first = type(self).get_rope_index, [], 0
    for at, kept in enumerate(keep.bool()):
        kinds, row = mm_token_type_ids[at, kept], slice(at, at + 1)
        begins = (kinds == 1) & (torch.nn.functional.pad(kinds[:-1], (1, 0)) != 1)
        grids = None if image_grid_thw is None else image_grid_thw[first : (first := first + int(begins.sum()))]
        made.append(whole(self, input_ids[row], mm_token_type_ids[row], grids, keep[row], **kwargs))
    positions, deltas = zip(*made, strict=True)
    return torch.cat(positions, 1), torch.cat(deltas)


ENTRY = HunYuanVL()
