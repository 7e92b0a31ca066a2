"""Inputs of HeGraphAdapter: frozen features, and values computed from them once."""

# R own classes, D width, M cache rows, C classes of all ranks

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmpeft_ds.ops.class_graph import Products


@dataclass(frozen=True)
class Nodes:
    """Frozen features that a head reads, not normalised. Where classes or cache are divided among the ranks: this
    rank's part.

    Attributes:
        positive, negative, visual: (R, D) text, negated text and mean image of each class; `negative` is None where no
            relation reads it.
        cache: (M, D) support features.
        labels: (M,) class of each, counted over the classes of all ranks.
    """

    positive: Tensor
    negative: Tensor | None
    visual: Tensor
    cache: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> Nodes:
        """The features in that dtype."""
        negative = None if self.negative is None else self.negative.to(dtype)
        features = [x.to(dtype) for x in (self.positive, self.visual, self.cache)]
        return Nodes(features[0], negative, *features[1:], self.labels)

    @property
    def of_classes(self) -> dict[str, Tensor]:
        """The nodes of the graph, by kind."""
        by_kind = {"positive": self.positive, "negative": self.negative, "visual": self.visual}
        return {kind: x for kind, x in by_kind.items() if x is not None}


@dataclass(frozen=True)
class Made:
    """Values computed from the nodes once.

    Attributes:
        source, versions: the tensors it was made of, to notice a change.
        nodes: see there.
        fixed: sums over edges.
        columns: classes of every rank where they are shared out, else of this one.
        first: first own class.
        cache_rows: (C,) over all ranks.
    """

    source: list[Tensor]
    versions: list[int]
    nodes: Nodes
    fixed: Products
    columns: list[int]
    first: int
    cache_rows: Tensor

    @property
    def own(self) -> slice:
        """Own classes."""
        return slice(self.first, self.first + len(self.nodes.positive))

    @property
    def labels(self) -> Tensor:
        """(M,) class of each cache row, counted over own classes."""
        return self.nodes.labels - self.first
