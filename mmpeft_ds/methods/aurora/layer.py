"""Layers of Aurora: what a linear map adds, the shared factors it borrows, the gates at the end of a text layer."""

# R rank, K modes of a leaf, D model width, c chunks of a feed-forward block

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.aurora.config import AuroraConfig
from mmpeft_ds.methods.common.beside import Added, is_eager, with_added
from mmpeft_ds.methods.common.borrowed import whole
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.low_rank import Product
from mmpeft_ds.methods.common.parts import spread
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.ops import mode_product
from mmpeft_ds.ops.beside_linear import Onto
from mmpeft_ds.ops.frame_weighting import weight_frame_keys
from mmpeft_ds.ops.gated_query import gated_query
from mmpeft_ds.ops.middle_sum import plus_middle
from mmpeft_ds.ops.mode_middles import mode_middles
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.sites.base import SharedWithTeacher, base_layer, features
from mmpeft_ds.sites.condition import current
from mmpeft_ds.sites.once import once

WEIGHT = {"widen": mode_product.widening_weight, "narrow": mode_product.narrowing_weight}
DELTA = {
    "attention": mode_product.mode_delta,
    "widen": mode_product.widening_delta,
    "narrow": mode_product.narrowing_delta,
}


@dataclass(frozen=True)
class LinearPlace:
    """One adapted leaf.

    Attributes:
        role: `attention`, or `widen` and `narrow` for the first and second map of a feed-forward block.
        parts: (first output feature, width) of each adapted part, in order; one unless the leaf is fused.
        widths: (in, out) of the factors; out is the width of one part, and both are D in a feed-forward block.
        chunks: c; 1 for attention.
        columns: modes that were initialised together in the published code, which sets their scale.
        scaled: whether the config's `scale` multiplies it.
        text: the leaf stands in a text tower.
        cross_key: it makes the keys of cross-attention.
    """

    role: str
    parts: tuple[tuple[int, int], ...]
    widths: tuple[int, int]
    chunks: int
    columns: int
    scaled: bool
    text: bool
    cross_key: bool = False

    @property
    def modes(self) -> int:
        """K."""
        return len(self.parts) if self.role == "attention" else self.chunks


class Factors(SharedWithTeacher, nn.Module):
    """Factors shared by all leaves of one (in, out) width. The first leaf that needs them holds them, the others refer
    to them.

    As published, a momentum teacher uses the student's instead of averages of them.

    Args:
        core: the full or superdiagonal core, which all widths share; None where another `Factors` holds it.
    """

    def __init__(self, widths: tuple[int, int], config: AuroraConfig, with_core: bool, like: Tensor):
        super().__init__()
        rank = config.r
        self.down = _parameter(like, rank, widths[0])
        self.up = _parameter(like, widths[1], rank)
        self.core = _parameter(like, *([rank] * (3 if config.form == "tucker" else 1))) if with_core else None
        with torch.no_grad():
            bound = 1 / math.sqrt(widths[0])
            self.down.uniform_(-bound, bound)
            self.up.zero_()
            if with_core and config.form == "tucker":
                self.core.uniform_(-math.sqrt(3) / rank, math.sqrt(3) / rank)
            elif with_core:
                self.core.fill_(1.0)


class ModeDelta(Fusable, Multiplies):
    """The update of one leaf by one adapter: its modes, between the shared factors.

    Args:
        factors: of the leaf's widths.
        holder: the `Factors` with the core; may be the same.
        leaves: the updates of this adapter so far, to which it adds itself.
    """

    def __init__(
        self, place: LinearPlace, config: AuroraConfig, factors: Factors, holder: Factors, leaves: list[ModeDelta]
    ):
        super().__init__()
        self.place_among, self.leaves = len(leaves), (leaves,)  # a tuple: no submodules
        leaves.append(self)
        self.place = place
        self.scale = config.scale if place.scaled or config.scale_all else 1.0
        self.borrowed = (factors, holder)  # a tuple: no submodules, so they are named, saved and counted once
        self.mode = _parameter(factors.down, config.r, place.modes)
        self.dropout = nn.Dropout(config.dropout)  # asked for its mode; the operators drop by themselves
        bound = math.sqrt(6 / (config.r + place.columns))
        with torch.no_grad():
            self.mode.uniform_(-bound, bound)

    def joins(self, x: Tensor, out_features: int) -> bool:
        """Whether `forward` may add itself to the output of the whole leaf, so wide and of the dtype of `x`: all is of
        one dtype and eager, and the parts are side by side."""
        place, core = self.place, self.borrowed[1].core
        if not is_eager(self, x, self.mode.dtype) or getattr(core, "ds_shape", core.shape)[1:] == ():
            return False
        drops = self.dropout.training and self.dropout.p > 0
        if place.role == "attention" and drops and place.text and place.modes > 1:
            return False
        return place.role != "attention" or sum(width for _, width in place.parts) == out_features

    def forward(self, x: Tensor, onto: Onto | None = None) -> Tensor:
        """(..., in) -> (..., K, part) for attention, else (..., out), in the dtype of the products.

        Args:
            onto: what the result is added to, where it `joins`; the sum has the shape of the leaf's output.
        """
        factors, holder = self.borrowed
        down, up, core = whole((factors.down, factors.up, holder.core))
        if onto is not None:
            dropout = self.dropout.p if self.dropout.training else 0.0
            return plus_middle(onto, x, down, self.middle(core), up, dropout=dropout, drop_before=self.place.text)
        with self.multiplying(x):
            added = DELTA[self.place.role](
                at_edge(x, down.dtype),
                down,
                up,
                core,
                self.mode,
                dropout=self.dropout.p if self.dropout.training else 0.0,
                drop_before_core=self.place.text,
            )
        return added if self.scale == 1.0 else added * self.scale

    def middle(self, core: Tensor) -> Tensor:
        """What stands between the factors, times the scale: one product a forward gives it for all leaves, where
        nothing is in parts (ZeRO-3)."""
        alone = lambda: mode_middles(core, [self.mode], [self.place.role])[0]  # noqa: E731
        parted = hasattr(core, "ds_id")
        made = alone() if parted else once(self.borrowed[1], self.place_among, lambda: self._of_all(core), alone)
        return made if self.scale == 1.0 else made * self.scale

    def _of_all(self, core: Tensor) -> tuple[Tensor, ...]:
        leaves = self.leaves[0]
        return mode_middles(core, [leaf.mode for leaf in leaves], [leaf.place.role for leaf in leaves])

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """The change of each part of the weight, (part, in)."""
        factors, holder = self.borrowed
        given = (factors.down, factors.up, holder.core, self.mode)
        if self.place.role == "attention":
            changes = list(mode_product.mode_weight(*given))
        else:
            changes = [WEIGHT[self.place.role](*given)]
        return [w * self.scale for w in changes]

    def thin_products(self) -> list[Product]:
        """The change of each part as a product of rank R: core and modes folded into one of the factors."""
        factors, holder = self.borrowed
        down, up, rest = factors.down, factors.up, (holder.core, self.mode)
        eye = torch.eye(len(down), dtype=down.dtype, device=down.device)
        if self.place.role == "attention":
            ups = mode_product.mode_weight(eye, up, *rest) * self.scale
            return [Product(start, down, each) for (start, _), each in zip(self.place.parts, ups, strict=True)]
        if self.place.role == "widen":
            return [Product(0, down, WEIGHT["widen"](eye, up, *rest) * self.scale)]
        return [Product(0, WEIGHT["narrow"](down, eye, *rest), up * self.scale)]


class AuroraLinear(nn.Module, SiteLayer):
    """A frozen Linear or Conv1D with mode deltas beside it, one per adapter.

    In the keys of cross-attention it also weights frames, where the running forward publishes `frame_weights`.
    """

    adapter_layer_names = ("aurora", "aurora_shared")

    def __init__(self, base: nn.Module, adapter_name: str, place: LinearPlace):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.out_features = features(base_layer(base))[1]
        self.aurora = nn.ModuleDict()
        self.aurora_shared = nn.ModuleDict()
        self.weights_frames = place.cross_key

    @property
    def tokenwise(self) -> bool:
        """See `SiteLayer`; frames are found by their position."""
        return not self.weights_frames

    def update_layer(
        self, adapter_name: str, place: LinearPlace, config: AuroraConfig, shared: dict[Any, Factors], path: str
    ) -> None:
        """Add an adapter.

        Args:
            shared: the adapter's factors so far, by widths; `core` is the one that holds the core, `leaves` the
                updates. What is missing is made and held here.
            path: of this leaf, for error messages.
        """
        self.path = path
        if place.widths not in shared:
            own = Factors(place.widths, config, "core" not in shared, base_layer(self).weight)
            shared[place.widths] = self.aurora_shared[adapter_name] = own
            shared.setdefault("core", own)
        delta = ModeDelta(place, config, shared[place.widths], shared["core"], shared.setdefault("leaves", []))
        self.aurora[adapter_name] = delta.train(self.base_layer.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., in) -> (..., out)."""
        active = [] if self._frozen() else [self.aurora[n] for n in self.active_adapters if n in self.aurora]
        out = with_added(self.base_layer, x, [self._added(delta, x) for delta in active], *args, **kwargs)
        return out if self._disable_adapters else self._weight_frames(out)

    def _added(self, delta: ModeDelta, x: Tensor) -> Added:
        joins = delta.joins(x, self.out_features)
        return Added(joins, lambda onto: delta(x, onto), lambda: self._spread(delta(x), delta.place))

    def _spread(self, added: Tensor, place: LinearPlace) -> Tensor:
        """Parts at their output features, zeros elsewhere."""
        if place.role != "attention":
            return added
        if sum(width for _, width in place.parts) == self.out_features:
            return added.flatten(-2)  # a view, where `spread` copies
        return spread(added.unbind(-2), place.parts, self.out_features)

    def _weight_frames(self, keys: Tensor) -> Tensor:
        condition = current() if self.weights_frames and self._used() else None
        if condition is None or condition.frame_weights is None:
            return keys
        weights = condition.expand_to(keys.shape[0]).frame_weights
        if keys.shape[1] % weights.shape[1]:
            raise BadInput(
                f"{self.path}: {keys.shape[1]} image tokens are not {weights.shape[1]} frames of equal length. "
                "Publish frame_weights only with the tokens of all frames, one frame after the other."
            )
        return weight_frame_keys(keys, weights)

    def _used(self) -> list[str]:
        names = self.merged_adapters if self.merged else self.active_adapters
        return [name for name in names if name in self.aurora]

    def lora_factors(self, adapter_name: str) -> list[Product]:
        """Its modes, between the shared factors. Weights of frames, which only frames of a published condition bring,
        are no part of it."""
        return self.aurora[adapter_name].thin_products() if adapter_name in self.aurora else []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold what the adapters add into the frozen weight; exact in evaluation."""
        for name in self._start_merge(adapter_names):
            delta = self.aurora[name]
            self._fold(name, delta.place.parts, delta.weights(), safe_merge)


class Captured:
    """States of the attention sublayers of one text layer, on their way to its end within one forward.

    They are taken before the layer's last tensor is kept for backward. So nothing stays behind, neither between
    forwards nor when a recomputation under activation checkpointing stops at that tensor; and self-attention, which
    always runs first, forgets what a broken forward may have left.
    """

    def __init__(self) -> None:
        self.own: Tensor | None = None
        self.cross: Tensor | None = None

    def put(self, states: Tensor, cross: bool) -> None:
        """Keep what self- or cross-attention gave."""
        self.own, self.cross = (self.own, states) if cross else (states, None)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Both, and forget them; None unless both attentions ran."""
        both = self.own, self.cross
        self.own = self.cross = None
        return None if both[0] is None or both[1] is None else both

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        return Captured()


@dataclass(frozen=True)
class NormPlace:
    """A LayerNorm of a text layer: the one at its `end`, or one after `self` or `cross` attention.

    Attributes:
        captured: shared by the norms of one layer.
        width: D.
    """

    role: str
    captured: Captured
    width: int


class Gates(Fusable):
    """The affine maps of gated query transformation, one adapter's, one text layer's."""

    def __init__(self, width: int, config: AuroraConfig, like: Tensor):
        super().__init__()
        for name in ("self_scale", "self_shift", "cross_scale", "cross_shift"):
            setattr(self, name, _parameter(like, width))
            with torch.no_grad():
                getattr(self, name).normal_(0.0, config.gate_std)

    def forward(self, out: Tensor, own: Tensor, cross: Tensor) -> Tensor:
        """(B, S, D), in the dtype of `out`."""
        dtype = self.self_scale.dtype
        states = [t if t.dtype == dtype else t.to(dtype) for t in (out, own, cross)]
        gated = gated_query(*states, self.self_scale, self.self_shift, self.cross_scale, self.cross_shift)
        return gated if gated.dtype == out.dtype else gated.to(out.dtype)


class AttentionEnd(nn.Module, SiteLayer):
    """The LayerNorm after an attention sublayer; hands a copy of what it gives to the end of the layer."""

    tokenwise = True
    other_param_names = ("adapters",)

    def __init__(self, base: nn.Module, adapter_name: str, place: NormPlace):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.captured, self.cross = place.captured, place.role == "cross"
        self.adapters: dict[str, bool] = {}

    def update_layer(self, adapter_name: str) -> None:
        """Add an adapter, which has nothing to train here."""
        self.adapters[adapter_name] = True

    def forward(self, x: Tensor) -> Tensor:
        """The output of the norm."""
        out = self.base_layer(x)
        if not self._disable_adapters:
            self.captured.put(out, self.cross)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to fold."""


class GatedEnd(nn.Module, SiteLayer):
    """The last LayerNorm of a text layer, and the gates after it where both attentions ran."""

    tokenwise = True
    adapter_layer_names = ("aurora_gates",)

    def __init__(self, base: nn.Module, adapter_name: str, place: NormPlace):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.captured, self.width = place.captured, place.width
        self.aurora_gates = nn.ModuleDict()

    def update_layer(self, adapter_name: str, config: AuroraConfig, path: str) -> None:
        """Add an adapter. `path` names this norm in error messages."""
        self.path = path
        self.aurora_gates[adapter_name] = Gates(self.width, config, base_layer(self).weight)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        states = self.captured.take()  # before anything below is kept for backward, see Captured
        self._frozen()  # restores what is merged if the adapters are off
        out = self.base_layer(x)
        if self._disable_adapters or states is None:
            return out
        if states[0].shape != out.shape:
            raise BadInput(
                f"{self.path}: gates need the whole sequence at once, but the layer works through it in pieces. "
                "Set the model's chunk_size_feed_forward to 0, or gates: false."
            )
        # Merging leaves the gates at work: they are no weight.
        for name in self.merged_adapters or self.active_adapters:
            if name in self.aurora_gates:
                out = self.aurora_gates[name](out, *states)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Note what was merged around here; the gates keep working."""
        self.merged_adapters += self._start_merge(adapter_names, ())


def _parameter(like: Tensor, *shape: int) -> nn.Parameter:
    """Trained in float32 whatever the base is; float64 stays float64, which reference vectors need."""
    dtype = full_dtype(like.dtype)
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=like.device))
