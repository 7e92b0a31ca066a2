"""Options of routed LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.methods.common.options import PROJECTIONS, RoutedOptions


@dataclass
class RoutedLoraOptions(RoutedOptions):
    """LoRA whose bottleneck is routed by an image feature: `out = x W^T + b + s B route(A x, A y)`.

    Source: Qu, Tuytelaars, Moens, ECCV 2024, arXiv 2403.09377.
    """

    alpha: float = field(default=16.0, metadata={"help": "The low-rank term is scaled by alpha / r."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout before `down`, with independent masks for text and condition."}
    )
    targets: list[str] = field(
        default_factory=lambda: ["q", "v"], metadata={"help": "Which projections of an attention site: q, k, v, out."}
    )
    coupled: bool = field(
        default=True,
        metadata={"help": "Fused q, k, v: route over all targeted parts jointly, as published, or each on its own."},
    )
    variant: Literal["plain", "after_up", "split", "split_merge", "split_merge_ln", "cross_attention"] = field(
        default="plain",
        metadata={
            "help": "Route in the bottleneck, after `up`, or with own two-stage projections of each modality; or "
            "cross-attention in the bottleneck in place of the route."
        },
    )
    train_bias: bool | list[str] = field(
        default=False,
        metadata={
            "help": "Train copies of the biases of the targeted projections, or of every Linear and norm whose full "
            "path matches one of these patterns."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._some_of("targets", PROJECTIONS)
        self._share("dropout", below=True)


Options = RoutedLoraOptions
