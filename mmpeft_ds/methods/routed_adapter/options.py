"""Options of routed adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import ACTIVATIONS, SUBLAYERS, RoutedOptions


@dataclass
class RoutedAdapterOptions(RoutedOptions):
    """A bottleneck after a sublayer, before the residual add: `o = act(route(A x + a, A y + a)) B + b`.

    In a causal tower the published form adds x inside and uses one adapter for all sublayers of a layer; elsewhere the
    sublayer's result is replaced by o, and every sublayer has its own.

    Source: Qu, Tuytelaars, Moens, ECCV 2024, arXiv 2403.09377.
    """

    r: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    after: list[str] | None = field(
        default=None,
        metadata={"help": "Which sublayers: self, cross, ffn; default all that the chosen layers have."},
    )
    residual: bool | None = field(
        default=None,
        metadata={"help": "Add the sublayer's own result to the adapter's; default as published: in causal towers."},
    )
    shared: bool | None = field(
        default=None,
        metadata={"help": "One adapter for all sublayers of a layer; default as published: in causal towers."},
    )
    activation: str | None = field(
        default=None,
        metadata={
            "help": "Non-linearity after the route (gelu, gelu_new, relu, silu, ...); default that of the backbone."
        },
    )
    variant: Literal["plain", "split", "split_merge", "split_merge_ln", "cross_attention"] = field(
        default="plain",
        metadata={
            "help": "One `down` for text and image, or own two-stage projections of each; or cross-attention in the "
            "bottleneck in place of the route."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.after is not None:
            self._some_of("after", SUBLAYERS)
        if self.activation is not None:
            self._one_of("activation", ACTIVATIONS)


Options = RoutedAdapterOptions
