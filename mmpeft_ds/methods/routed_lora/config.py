"""Fields of routed LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from peft import PeftConfig

from mmpeft_ds.errors import BadInput
from mmpeft_ds.ops.route import ROUTES

PEFT_TYPE = "ROUTED_LORA"
VARIANTS = ("plain", "after_up", "split", "split_merge", "split_merge_ln")
SOURCES = ("given", "self", "self_mean", "cross", "cross_mean")
POOLS = ("all", "mean", "first")


@dataclass
class RoutedLoraConfig(PeftConfig):
    """LoRA whose bottleneck is routed by an image feature: `out = x W^T + b + s B route(A x, A y)`.

    Source: Qu, Tuytelaars, Moens, ECCV 2024, arXiv 2403.09377.
    """

    target_modules: ClassVar[None] = None  # peft reads it; the sites say where, not a list of names

    r: int = field(default=16, metadata={"help": "Rank of each projection."})
    alpha: float = field(default=16.0, metadata={"help": "The low-rank term is scaled by alpha / r."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout before `down`, with independent masks for text and condition."}
    )
    route: Literal["none", "mul", "add", "matmul1", "matmul2", "matmul1_relu", "xtxt", "ones"] = field(
        default="mul", metadata={"help": "Routing function; `none` is plain LoRA and needs no condition."}
    )
    targets: list[str] = field(
        default_factory=lambda: ["q", "v"], metadata={"help": "Which projections of an attention site: q, k, v, out."}
    )
    tower: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Path of the tower, or `text` or `image`; default the text tower, or the only tower. A list takes "
            "several: [text] is encoder and decoder of BART."
        },
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Layer indices of the tower; default all."})
    coupled: bool = field(
        default=True,
        metadata={"help": "Fused q, k, v: route over all targeted parts jointly, as published, or each on its own."},
    )
    reshape_compat: bool = field(
        default=False,
        metadata={"help": "Re-read memory where the equation transposes, as published (differs for m > 1)."},
    )
    variant: Literal["plain", "after_up", "split", "split_merge", "split_merge_ln"] = field(
        default="plain",
        metadata={"help": "Route in the bottleneck, after `up`, or with own two-stage projections of each modality."},
    )
    train_bias: bool | list[str] = field(
        default=False,
        metadata={
            "help": "Train copies of the biases of the targeted projections, or of every Linear and norm whose full "
            "path matches one of these patterns."
        },
    )
    train_norms: bool | list[str] = field(
        default=False,
        metadata={"help": "Train copies of the norms of the chosen layers, or of those matching full-path patterns."},
    )
    condition: Literal["given", "self", "self_mean", "cross", "cross_mean"] = field(
        default="given",
        metadata={
            "help": "What is routed on: what the model publishes, the layer's own input (or its masked mean), or the "
            "encoder states of cross-attention (or their masked mean)."
        },
    )
    pool: Literal["all", "mean", "first"] = field(
        default="all", metadata={"help": "Pooling of a given condition: every token, their masked mean, the first."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole beside the adapter, such as the head."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        self._one_of("route", [self.route], ROUTES)
        self._one_of("targets", self.targets, ("q", "k", "v", "out"))
        self._one_of("variant", [self.variant], VARIANTS)
        self._one_of("condition", [self.condition], SOURCES)
        self._one_of("pool", [self.pool], POOLS)
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise BadInput(f"targets: {self.targets} must name at least one projection, each once.")
        if self.r < 1:
            raise BadInput(f"r: must be 1 or more, got {self.r}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout: must lie in [0, 1), got {self.dropout}.")
        if self.variant != "plain" and self.route == "none":
            raise BadInput(f"variant: {self.variant!r} exists to be routed. Choose a route, or variant: plain.")
        if self.variant.startswith("split") and self.r % 4:
            raise BadInput(f"r: variant {self.variant!r} works in a quarter of it; {self.r} is no multiple of 4.")

    @property
    def routed(self) -> bool:
        """Whether layers need a condition."""
        return self.route != "none"

    @staticmethod
    def _one_of(key: str, given: list[str], known: tuple[str, ...]) -> None:
        for value in given:
            if value not in known:
                raise BadInput(f"{key}: {value!r} is unknown. Known: {', '.join(known)}.")
