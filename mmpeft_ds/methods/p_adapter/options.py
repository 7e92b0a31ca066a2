"""Options of p-Adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.options import SUBLAYERS, SiteOptions

CLAMP = (1.0, 3.0)


@dataclass
class PAdapterOptions(SiteOptions):
    """Adapters after attention that pass messages over its map, and parallel adapters beside the feed-forward block.

    Source: Wu et al., "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models", AAAI 2024.
    """

    mode: Literal["released", "published"] = field(
        default="released",
        metadata={
            "help": "What the released code computes (gated, in the bottleneck, value nodes), or the equations of the "
            "paper (degrees on both sides, in full width, in place of the attention output)."
        },
    )
    r: int = field(default=8, metadata={"help": "Reduction after attention: a bottleneck of width / r."})
    r2: int = field(default=8, metadata={"help": "Reduction beside the feed-forward block."})
    sublayers: list[str] = field(
        default_factory=lambda: list(SUBLAYERS),
        metadata={"help": "Which get an adapter, of those the tower has: self, cross, ffn."},
    )
    p: float = field(default=1.25, metadata={"help": "Exponent at start: 1.25 VQAv2, 1.5 SNLI-VE, 1.75 captions."})
    p_cross: float | None = field(default=None, metadata={"help": "The same in cross-attention; default as p."})
    learnable_p: bool = field(default=True, metadata={"help": "Train p, one for each adapter."})
    clamp_p: bool = field(
        default=True, metadata={"help": "Use p within [1, 3]; the release leaves it free. No effect on a fixed p."}
    )
    decay_p: bool = field(
        default=False, metadata={"help": "Let weight decay act on p and m, as the release does; it pulls p to 0."}
    )
    mu: float = field(
        default=0.1,
        metadata={"help": "Pull to the own node; a trained m scales it by 2 + tanh(m), 2 at start (published: by 1)."},
    )
    groups: int | None = field(
        default=16, metadata={"help": "Cross-attention keys are averaged into so many bins; null keeps each key."}
    )
    self_loops: Literal["keep", "drop"] = field(
        default="keep",
        metadata={"help": "Edges of a token to itself, which outweigh all others for p < 2; drop leaves them out."},
    )
    query_node: Literal["query", "zeros", "noise"] = field(
        default="query", metadata={"help": "What query nodes hold in bipartite graphs; the others are ablations."}
    )
    propagation: Literal["p_laplacian", "gcn", "appnp", "gcnii"] = field(
        default="p_laplacian", metadata={"help": "Message passing; all but p_laplacian are ablations."}
    )
    decode_graph: Literal["same", "released"] = field(
        default="same",
        metadata={
            "help": "Self-attention with cached keys: the graph of training, so that a cache changes nothing, or the "
            "query-value graph that the release switches to."
        },
    )
    kernel: Literal["auto", "dense", "stream"] = field(
        default="auto",
        metadata={
            "help": "Hold all node differences (dense), recompute them in tiles (stream), or the latter wherever it "
            "can be, on a GPU in Triton kernels, but for small maps on a CPU (auto)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._some_of("sublayers", SUBLAYERS)
        self._at_least("r", 1)
        self._at_least("r2", 1)
        if self.groups is not None and self.groups < 1:
            raise BadInput(f"groups: must be 1 or more, or null for no pooling, got {self.groups}.")
        for key in ("p", "p_cross", "mu"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise BadInput(f"{key}: must be a positive number, got {value}.")
        low, high = CLAMP
        for key in ("p", "p_cross"):
            value = getattr(self, key)
            if self.learnable_p and self.clamp_p and value is not None and not low <= value <= high:
                raise BadInput(
                    f"{key}: {value} lies outside [{low:g}, {high:g}]. Set clamp_p: false to leave it free."
                )
        if self.mode == "published" and (self.propagation != "p_laplacian" or self.query_node != "query"):
            raise BadInput("mode: published goes with propagation: p_laplacian and query_node: query alone.")
        if self.self_loops == "drop" and self.kernel == "stream":
            raise BadInput("self_loops: drop needs the attention matrix. Set kernel: dense, or auto.")

    @property
    def clamps(self) -> bool:
        """Whether p is kept within its bounds."""
        return self.learnable_p and self.clamp_p

    def start_of_p(self, cross: bool) -> float:
        """The exponent at which an adapter starts."""
        return self.p_cross if cross and self.p_cross is not None else self.p


Options = PAdapterOptions
