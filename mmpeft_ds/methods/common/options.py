"""Options that several methods share, and the names that they may hold; read without torch and peft."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NoReturn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import MethodOptions

Route = Literal["none", "mul", "add", "matmul1", "matmul2", "matmul1_relu", "xtxt", "ones"]
PROJECTIONS = ("q", "k", "v", "out")
SUBLAYERS = ("self", "cross", "ffn")
# Non-linearities of bottlenecks, by the names that transformers gives them in model configurations.
ACTIVATIONS = (
    "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "tanh", "linear",
)  # fmt: skip
# Variants of a routed bottleneck that work in a quarter of the rank.
IN_A_QUARTER = ("split", "split_merge", "split_merge_ln", "cross_attention")


@dataclass
class SiteOptions(MethodOptions):
    """Options of a method that attaches to the sites of one tower or of several."""

    tower: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Path of the tower, or `text` or `image`, or a list of these ([text] is encoder and decoder of "
            "BART); default the text tower, or the only tower."
        },
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Layer indices of the tower; default all."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full with the adapter, such as the head."}
    )


@dataclass
class RoutedOptions(SiteOptions):
    """Options of a bottleneck that an image feature routes. A subclass adds `variant` and where it stands."""

    r: int = field(default=16, metadata={"help": "Width of the bottleneck."})
    route: Route = field(
        default="mul",
        metadata={"help": "Routing function; `none` routes nothing and needs no condition (see `variant`)."},
    )
    heads: int = field(default=4, metadata={"help": "Heads of `variant: cross_attention`."})
    reshape_compat: bool = field(
        default=False,
        metadata={"help": "Re-read memory where the equation transposes, as published (differs for m > 1)."},
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least("r", 1)
        self._at_least("heads", 1)
        if self.variant not in ("plain", "cross_attention") and self.route == "none":
            raise BadInput(f"variant: {self.variant!r} exists to be routed. Choose a route, or variant: plain.")
        if self.variant in IN_A_QUARTER and self.r % 4:
            raise BadInput(f"r: variant {self.variant!r} works in a quarter of it; {self.r} is no multiple of 4.")

    @property
    def routed(self) -> bool:
        """Whether layers need a condition."""
        return self.route != "none" or self.variant == "cross_attention"


@dataclass
class HeadOptions(MethodOptions):
    """Base of the options of a head on frozen features; errors begin with its `method`.

    Attributes:
        method: the name of the method's folder.
    """

    method: ClassVar[str] = ""
    scores_features: ClassVar[bool] = True

    def _refuse(self, key: str, problem: str) -> NoReturn:
        raise BadInput(f"{self.method}: {key}: {problem}")
