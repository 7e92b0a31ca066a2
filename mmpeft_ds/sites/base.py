"""Where adapters attach: the attention and feed-forward sites of a model, found by class, named by full path."""

# Import rule: torch only. transformers classes are recognised by name so that nothing is imported for nothing.

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Projection:
    """One linear map of a site.

    Attributes:
        path: full path of the Linear or Conv1D module.
        start: first output feature used, for a fused projection (GPT-2 c_attn: q 0, k d, v 2d).
        width: number of output features used.
    """

    path: str
    start: int
    width: int


@dataclass(frozen=True)
class AttentionSite:
    """One attention block.

    Attributes:
        path: full path of the attention module.
        tower: path of the tower it belongs to, e.g. `text_model` or `vision_model`.
        layer: index in the tower, counted from 0.
        q, k, v, out: projections; q, k and v share a path when fused.
        heads: number of query heads.
        in_width: width of the input of q.
        norm: full path of the LayerNorm of this sublayer; `pre_norm` says on which side it stands.
        cross: keys and values come from another sequence.
        causal: later tokens are masked.
    """

    path: str
    tower: str
    layer: int
    q: Projection
    k: Projection
    v: Projection
    out: Projection
    heads: int
    in_width: int
    norm: str | None
    pre_norm: bool
    cross: bool = False
    causal: bool = False

    @property
    def fused(self) -> bool:
        return self.q.path == self.v.path


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward block: `up` widens, `down` returns to the model width; `output` is the module after whose
    result the residual is added."""

    path: str
    tower: str
    layer: int
    up: Projection
    down: Projection
    norm: str | None
    pre_norm: bool
    activation: str


@dataclass(frozen=True)
class Sites:
    """All sites of a model in the order in which they run."""

    attention: list[AttentionSite] = field(default_factory=list)
    ffn: list[FFNSite] = field(default_factory=list)
