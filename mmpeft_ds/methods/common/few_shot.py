"""Base of the few-shot heads: cosines with class texts, and values computed once from the frozen bank."""

# B rows, C classes, T templates, D feature width

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def cosine_logits(image_BD: Tensor, text_CD: Tensor, scale: float) -> Tensor:
    """(B, C) scaled cosines of image features and class texts of any length, in the dtype of the texts."""
    # in the order of `ZeroShot`, so that a head that changes nothing gives its bits
    return scale * normalize(image_BD.to(text_CD.dtype), dim=-1) @ normalize(text_CD, dim=-1).T


def unit_ensemble(texts_CTD: Tensor) -> Tensor:
    """(C, D) unit vectors: each template to length 1, their mean, to length 1 again, as Tip-Adapter makes them."""
    return normalize(normalize(texts_CTD, dim=-1).mean(1), dim=-1)


class Remembered:
    """Results computed once from frozen tensors, and again when one of those is replaced, moved or written to."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, Any]] = {}

    def get(self, name: str, make: Callable[..., Any], *tensors: Tensor) -> Any:
        """`make(*tensors)`, without gradient."""
        sources, result = self._known.get(name, ([], None))
        same = len(sources) == len(tensors) and all(
            old is new and version == new._version for (old, version), new in zip(sources, tensors, strict=True)
        )
        if not same:
            # a tensor made in inference mode could not take part in training afterwards
            with torch.inference_mode(False), torch.no_grad():
                result = make(*tensors)
            self._known[name] = ([(tensor, tensor._version) for tensor in tensors], result)
        return result
