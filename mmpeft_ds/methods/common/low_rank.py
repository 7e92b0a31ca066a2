"""Changes of weights that are products of two thin matrices, as LoRA has them: what lets others than this package run
an adapter."""

# r rank, d width of the input, o width of the output or of a part of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_PRODUCT = "its change of a weight is no product of two thin matrices."


@dataclass(frozen=True)
class Product:
    """The change `up down` of consecutive output features of a weight.

    Attributes:
        start: first of them.
        down: (r, d); parts of one weight may share the tensor itself.
        up: (o, r), with every scale in it.
    """

    start: int
    down: Tensor
    up: Tensor


def joined(products: Sequence[Product], out_features: int) -> tuple[Tensor, Tensor]:
    """The changes of all parts of a weight as one: `down` (R, d) and `up` (out_features, R).

    R is the sum of the ranks of all tensors `down`; a shared one counts once.
    """
    downs: list[Tensor] = []
    for product in products:
        if not any(product.down is down for down in downs):
            downs.append(product.down)
    first = {id(down): sum(len(before) for before in downs[:at]) for at, down in enumerate(downs)}
    up = downs[0].new_zeros(out_features, sum(len(down) for down in downs))
    for product in products:
        column = first[id(product.down)]
        up[product.start : product.start + len(product.up), column : column + len(product.down)] = product.up
    return torch.cat(downs), up
