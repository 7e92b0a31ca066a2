"""Options of GA-Net, and the three named settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import HeadOptions

# What `variant` says of every field that a recipe leaves out.
VARIANTS: dict[str, dict[str, Any]] = {
    # the method as the paper describes it, without the defects of the release
    "fix": {
        "graph": "threshold", "tau": 0.7, "k": 5, "symmetric": True, "direction": "from_neighbour",
        "self_loops": "merged",
        "normalise_similarity": True, "normalise_input": False, "up": "joined", "activation": "relu",
        "residual": False, "fusion": False, "train": "all", "fisher": "model",
    },
    # as released in July 2024, with the paper
    "v1": {
        "graph": "threshold", "tau": 0.7, "k": 5, "symmetric": True, "direction": "from_neighbour",
        "self_loops": "merged",
        "normalise_similarity": False, "normalise_input": False, "up": "joined", "activation": "none",
        "residual": False, "fusion": False, "train": "head", "fisher": "released",
    },
    # as released in June 2025, with the journal version
    "v2": {
        "graph": "knn", "tau": 0.4, "k": 5, "symmetric": False, "direction": "to_neighbour",
        "self_loops": "appended",
        "normalise_similarity": False, "normalise_input": False, "up": "image", "activation": "none",
        "residual": False, "fusion": True, "train": "head", "fisher": "released",
    },
}  # fmt: skip

_BY_VARIANT = "Default: as the variant says. "


@dataclass
class GaNetOptions(HeadOptions):
    """Samples of the global batch as nodes of a graph; two graph convolutions around a bottleneck classify them.

    Source: Cheng, Lu, arXiv 2408.00290.
    """

    method: ClassVar[str] = "ga_net"

    variant: Literal["fix", "v1", "v2"] = field(
        default="fix",
        metadata={
            "help": "fix: the method as described, all of it trained. v1, v2: what the two releases compute, where "
            "the bottleneck stays at its random start. Each of the other fields may be set apart from it."
        },
    )
    inputs: Literal["both", "image", "text"] = field(
        default="both", metadata={"help": "Which features make a node: text and image joined, or one of them."}
    )
    r: int = field(default=512, metadata={"help": "Width of the bottleneck."})
    graph: Literal["auto", "threshold", "knn", "none"] = field(
        default="auto",
        metadata={
            "help": "threshold: an edge where the cosine exceeds tau. knn: from a sample to its k most similar ones, "
            "of those above tau. none: no edges, every sample by itself. auto: as the variant says."
        },
    )
    tau: float | None = field(
        default=None, metadata={"help": _BY_VARIANT + "Cosine that an edge has to exceed, strictly."}
    )
    tau_grid: list[float] = field(
        default_factory=list,
        metadata={
            "help": "After training, take of these the tau with the best top-1 on the validation rows; the first "
            "of equals. Empty: keep tau."
        },
    )
    tau_batch: int = field(
        default=512, metadata={"help": "Rows of a graph in that search; give it data.global_batch."}
    )
    k: int | None = field(default=None, metadata={"help": _BY_VARIANT + "Neighbours of a sample in a knn graph."})
    symmetric: bool | None = field(
        default=None,
        metadata={"help": _BY_VARIANT + "Edges of a knn graph point both ways."},
    )
    direction: Literal["auto", "to_neighbour", "from_neighbour"] = field(
        default="auto",
        metadata={
            "help": "Of a knn graph that is not symmetric: to_neighbour: a sample is heard by its neighbours, as in "
            "v2; from_neighbour: it hears them."
        },
    )
    normalisation: Literal["symmetric", "mean"] = field(
        default="symmetric",
        metadata={"help": "symmetric: by the roots of both degrees. mean: of all that a sample hears (GraphSAGE)."},
    )
    exchange: Literal["gather", "ring"] = field(
        default="gather",
        metadata={"help": "ring: the rows of the ranks pass by, so that none ever holds all; same results."},
    )
    self_loops: Literal["auto", "merged", "appended"] = field(
        default="auto",
        metadata={
            "help": "merged: each node has one edge to itself. appended, of a knn graph: one more than the search has "
            "found, whose first hit is taken for the node itself, as in v2; it differs where rows are equal."
        },
    )
    normalise_similarity: bool | None = field(
        default=None,
        metadata={
            "help": _BY_VARIANT + "Cosine of features of which each modality has length 1, so both count alike."
        },
    )
    normalise_input: bool | None = field(
        default=None, metadata={"help": _BY_VARIANT + "The network, too, reads modalities of length 1."}
    )
    up: Literal["auto", "joined", "image"] = field(
        default="auto", metadata={"help": "Width after the bottleneck: of the node, or of image features (v2)."}
    )
    activation: Literal["auto", "relu", "none"] = field(
        default="auto", metadata={"help": "After the convolution in the bottleneck."}
    )
    residual: bool | None = field(
        default=None, metadata={"help": _BY_VARIANT + "Add the node to what `up` gives; needs up: joined."}
    )
    fusion: bool | None = field(
        default=None,
        metadata={
            "help": _BY_VARIANT + "Hold the fusion module of v2. It takes part in the released Fisher pass alone."
        },
    )
    fusion_width: int = field(default=256, metadata={"help": "Hidden width of that module."})
    train: Literal["auto", "all", "head"] = field(
        default="auto",
        metadata={
            "help": "head: the bottleneck stays as it was drawn, as in the releases, whose optimiser misses it."
        },
    )
    fisher: Literal["auto", "model", "released"] = field(
        default="auto",
        metadata={
            "help": "Of which logits elastic weight consolidation estimates its Fisher information: those of the "
            "model, or those of the releases, which skip the bottleneck."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in VARIANTS[self.variant].items():
            if getattr(self, key) in (None, "auto"):
                setattr(self, key, value)
        self._check()

    def _check(self) -> None:
        for key in ("r", "k", "fusion_width", "tau_batch"):
            self._at_least(key, 1)
        for key, values in (("tau", [self.tau]), ("tau_grid", self.tau_grid)):
            if not all(-1 <= tau <= 1 for tau in values):
                raise BadInput(f"{key}: a cosine lies in [-1, 1], got {getattr(self, key)}.")
        if self.tau_grid and self.graph == "none":
            raise BadInput("tau_grid: graph: none has no tau to search. Leave it out, or set graph: threshold.")
        if self.self_loops == "appended" and (self.graph == "threshold" or self.symmetric):
            raise BadInput("self_loops: appended is of a knn graph that is not symmetric. Set self_loops: merged.")
        if self.residual and self.up != "joined":
            raise BadInput("residual: a node can only be added to what has its width. Set up: joined.")
        if self.fusion and self.inputs != "both":
            raise BadInput(f"fusion: it weighs text against image, and inputs is {self.inputs}. Set inputs: both.")
        if self.fisher == "released" and not self.fusion and self.up != "joined":
            raise BadInput("fisher: released reads the node in place of what `up` gives. Set up: joined.")

    @property
    def needs_validation(self) -> bool:
        """A tau is searched there."""
        return bool(self.tau_grid)

    @property
    def couples_samples(self) -> bool:
        """Logits of a sample depend on the others of its step."""
        return self.graph != "none"

    @property
    def reads_captions(self) -> bool:
        """A node is made of them, unless it is of the image alone."""
        return self.inputs != "image"


Options = GaNetOptions
