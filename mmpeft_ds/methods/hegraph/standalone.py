"""HeGraphAdapter without a model around it: tensors in, logits out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.hegraph.head import ClassGraphHead
from mmpeft_ds.methods.hegraph.nodes import Nodes
from mmpeft_ds.ops.class_relations import Coefficients


class HeGraphHead(ClassGraphHead):
    """The head on given features; its state dict holds W_n, W_p, W_v and the features.

    `forward(z)` gives the logits of both heads, `predict(z)` probabilities, `losses(z, y)` the training loss of each
    row, `refine()` the refined texts and cache shifts, `export()` a classifier without a graph.

    Args:
        pos, neg, vis: (C, D) text, negated text and mean image feature of each class, not normalised; with
            `shard="classes"` those of this rank's classes (R, D), in rank order. `neg` may be None without `np`.
        cache: (M, D) support features, not normalised; with `shard="cache"` the rows of this rank, with
            `shard="classes"` those of its classes. M may be 0 on some ranks.
        labels: (M,) int64 class of each, counted over all classes.
        coeffs: factors, or those that differ from the defaults, by name.
        tau: scale of the text head's logits.
        act: activation of the messages.
        options: further arguments of `ClassGraphHead`.

    Raises:
        BadInput: shapes that do not belong together, an unknown option.
    """

    def __init__(
        self,
        pos: Tensor,
        neg: Tensor | None,
        vis: Tensor,
        cache: Tensor,
        labels: Tensor,
        *,
        coeffs: Coefficients | dict[str, float] | None = None,
        tau: float,
        degree: str = "bipartite",
        act: str = "tanh",
        visual_scale: float | None = None,
        **options: Any,
    ):
        check_shapes(pos, neg, vis, cache, labels)
        if not isinstance(coeffs, Coefficients):
            known = [f.name for f in dataclasses.fields(Coefficients)]
            unknown = [name for name in coeffs or {} if name not in known]
            if unknown:
                raise BadInput(f"coeffs: {unknown[0]!r} is unknown. Known: {', '.join(known)}.")
            coeffs = Coefficients(**(coeffs or {}))
        super().__init__()
        self.set_up(
            pos.shape[1],
            coeffs,
            tau,
            degree=degree,
            activation=act,
            visual_scale=visual_scale,
            device=pos.device,
            dtype=pos.dtype,
            **options,
        )
        if neg is None and "np" in self.relations:
            raise BadInput("neg: missing, but relation np reads the negated texts. Give them, or leave np out.")
        given = {"positive": pos, "negative": neg, "visual": vis, "cache": cache, "labels": labels}
        for name, tensor in given.items():
            self.register_buffer(name, tensor)

    def nodes(self) -> Nodes:
        return Nodes(self.positive, self.negative, self.visual, self.cache, self.labels)

    def source(self) -> list[Tensor]:
        return [t for t in (self.positive, self.negative, self.visual, self.cache, self.labels) if t is not None]

    def replicated(self) -> list[Tensor]:
        if self.shard == "none":
            return self.source()
        return [] if self.shard == "classes" else self.source()[:-2]

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) of the text head and of the cache head."""
        return self.both(z)


def check_shapes(pos: Tensor, neg: Tensor | None, vis: Tensor, cache: Tensor, labels: Tensor) -> None:
    """Refuse features that do not belong together. Raises BadInput."""
    for name, tensor in {"neg": neg, "vis": vis}.items():
        if tensor is not None and tensor.shape != pos.shape:
            raise BadInput(
                f"{name}: shape {tuple(tensor.shape)}, but class texts have {tuple(pos.shape)}. All must come "
                "from one pair of encoders, a row per class."
            )
    if cache.dim() != 2 or cache.shape[1] != pos.shape[1] or labels.shape != cache.shape[:1]:
        raise BadInput(
            f"cache: shape {tuple(cache.shape)} with labels {tuple(labels.shape)} does not fit texts of width "
            f"{pos.shape[1]}. Give (M, {pos.shape[1]}) and (M,)."
        )
    if labels.dtype != torch.int64:
        raise BadInput(f"labels: dtype {labels.dtype}, expected torch.int64.")
