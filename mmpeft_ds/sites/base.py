"""Sites where adapters attach: attention and feed-forward blocks of a model, found by class, named by full path."""

# Import rule: torch only. transformers classes are recognised by name so that nothing is imported for nothing.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from mmpeft_ds.sites.feature_site import FeatureSite


@dataclass(frozen=True)
class Projection:
    """One linear map of a site.

    Attributes:
        path: full path of the Linear or Conv1D module.
        start: first output feature used, for a fused projection (GPT-2 c_attn: q 0, k d, v 2d).
        width: number of output features used.
        in_width: number of input features.
    """

    path: str
    start: int
    width: int
    in_width: int


@dataclass(frozen=True)
class AttentionSite:
    """One attention block.

    Attributes:
        path: full path of the attention module.
        tower: path of the tower it belongs to, e.g. `text_model` or `vision_model`; empty for a bare tower.
        modality: `text` or `image`, what that tower reads.
        layer: index in the tower, counted from 0.
        q, k, v, out: projections; q, k and v share a path when fused.
        heads: number of query heads.
        in_width: width of the input of q.
        norm: full path of the LayerNorm of this sublayer; `pre_norm` says on which side it stands.
        cross: keys and values come from another sequence.
        causal: later tokens are masked.
        block: full path of the transformer layer.
        output: full path of the dropout between `out` and the residual add, where the family has one of its own.
    """

    path: str
    tower: str
    modality: str
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
    block: str = ""
    output: str | None = None

    @property
    def end(self) -> str:
        """Full path of the last module before the residual add: its result is this sublayer's."""
        return self.output or self.out.path

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.q.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads of k and v: fewer than `heads` where groups of query heads share them."""
        return self.k.width // self.head_dim

    @property
    def fused(self) -> bool:
        return self.q.path == self.v.path


@dataclass(frozen=True)
class FFNSite:
    """One feed-forward block: `up` widens, `down` returns to the model width. The rest as in `AttentionSite`.

    Attributes:
        activation: its non-linearity, as transformers names it (a key of `ACT2FN`).
        gate: the second widening projection of a gated block (SwiGLU), else None.
    """

    path: str
    tower: str
    modality: str
    layer: int
    up: Projection
    down: Projection
    norm: str | None
    pre_norm: bool
    activation: str
    block: str = ""
    output: str | None = None
    gate: Projection | None = None

    @property
    def end(self) -> str:
        """Full path of the last module before the residual add: its result is this sublayer's."""
        return self.output or self.down.path


@dataclass(frozen=True)
class Sites:
    """All sites of a model in the order in which they run; `features` where classification heads attach.

    Attributes:
        unread: text towers that have layers of which none can be read, and the class of these layers.
    """

    attention: list[AttentionSite] = field(default_factory=list)
    ffn: list[FFNSite] = field(default_factory=list)
    features: list[FeatureSite] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def towers(self) -> dict[str, str]:
        """Path of each tower and its modality, in order."""
        return {s.tower: s.modality for s in (*self.attention, *self.ffn)}


@dataclass(frozen=True)
class Block:
    """A transformer layer as `find_sites` met it: `path` and `module` of the layer, the tower around it, its index."""

    path: str
    module: nn.Module
    tower: str
    modality: str
    layer: int

    def projection(self, name: str, start: int = 0, width: int | None = None) -> Projection:
        """The linear map at `name` below this layer; sizes are read from the module, never from its weight, which
        may be partitioned or on the meta device."""
        linear = base_layer(self.module.get_submodule(name))
        in_width, out_width = features(linear)
        return Projection(f"{self.path}.{name}", start, out_width if width is None else width, in_width)


@dataclass(frozen=True)
class Family:
    """Reader of the classes of one model family; the `ENTRY` of a file in sites/families/.

    Attributes:
        towers: class name of each tower and its modality.
        layers: class name of each transformer layer and a function from a `Block` to its sites.
    """

    towers: dict[str, str]
    layers: dict[str, Callable[[Block], Sites]]


class SharedWithTeacher:
    """Mark of a module of which a momentum teacher uses the student's parameters instead of averages of them."""


def base_layer(module: nn.Module) -> nn.Module:
    """The module inside any adapter wrappers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def base_model(model: nn.Module) -> nn.Module:
    """The model that peft has wrapped, adapters inside; `model` itself where there is no wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) features of a Linear or of transformers' Conv1D, without touching the weight."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    return linear.nx, linear.nf


class AdapterLayer:
    """Properties of an adapter's layer by which a backbone may skip tokens around it; both are off by default, which
    is always right and sometimes slower.

    Attributes:
        tokenwise: a token's output depends on that token alone, so tokens that nobody reads may be left out.
        rowless: besides, it does not matter which row of the batch the token is of, so the tokens of all rows may be
            put into one.
    """

    tokenwise = False
    rowless = False
