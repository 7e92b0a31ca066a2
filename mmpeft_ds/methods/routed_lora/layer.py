"""Layers of routed LoRA: the low-rank path of a projection."""

# B batch, L text length, m conditioning tokens, d in width, o width of a part, g parts of a fused projection, r rank

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.low_rank import Product
from mmpeft_ds.methods.common.parts import spread
from mmpeft_ds.methods.common.products import at_edge
from mmpeft_ds.methods.common.routed import Bottleneck, routed_on
from mmpeft_ds.methods.routed_lora.config import RoutedLoraConfig
from mmpeft_ds.sites.base import base_layer, features


@dataclass(frozen=True)
class Projections:
    """The adapted projections of one Linear or Conv1D.

    Attributes:
        parts: (first output feature, width) of each adapted part; one unless the projection is fused.
        train_bias: train a copy of its bias too.
    """

    parts: tuple[tuple[int, int], ...]
    train_bias: bool = False


class RoutedDelta(Bottleneck):
    """The low-rank path of one adapter on one projection: `down`, route, `up`, and the trained bias.

    Args:
        base: the frozen Linear or Conv1D.
        place: which output features it adds to, and whether the bias trains.
        config: of the adapter.
    """

    def __init__(self, base: nn.Module, place: Projections, config: RoutedLoraConfig):
        d, out_features = features(base)
        parts, weight = place.parts, base.weight
        super().__init__(config, d, weight, len(parts), 1 if config.coupled else len(parts))
        self.out_features, self.parts, self.dropout = out_features, parts, config.dropout
        self.scale = config.alpha / config.r
        self.B = self.parameter(sum(width for _, width in parts), config.r)
        self.reset()
        bias = base._parameters.get("bias") if place.train_bias else None
        self.has_bias = bias is not None
        if bias is not None:
            with gathered([bias]):
                self.bias = nn.Parameter(bias.detach().to(self.B.dtype, copy=True))
                # Under ZeRO-3 the frozen bias may be away when this path needs it.
                self.register_buffer("frozen_bias", bias.detach().clone(), persistent=False)
        else:
            self.bias = None

    @torch.no_grad()
    def reset(self) -> None:
        """`down` Kaiming uniform, `up` zero: the layer starts as the frozen one."""
        self.reset_bottleneck()
        self.B.zero_()

    def forward(self, x_BLd: Tensor, y_Bmd: Tensor | None, mask_Bm: Tensor | None, base_bias: Tensor | None) -> Tensor:
        """The update of the frozen output, (B, L, out); the trained bias replaces `base_bias`."""
        with self.multiplying(x_BLd):
            dtype = self.B.dtype
            y_Bmd = None if y_Bmd is None else at_edge(y_Bmd, dtype)
            return self._delta(at_edge(x_BLd, dtype), y_Bmd, mask_Bm, base_bias)

    def _delta(self, x: Tensor, y_Bmd: Tensor | None, mask_Bm: Tensor | None, base_bias: Tensor | None) -> Tensor:
        if self.dropout and self.training:
            y_Bmd = None if y_Bmd is None else F.dropout(y_Bmd, self.dropout)
            x = F.dropout(x, self.dropout)
        bias = self.bias - base_bias if self.has_bias else None
        if self.variant == "after_up":
            h, v = self._up(F.linear(x, self.A)), self._up(F.linear(y_Bmd, self.A))
            delta = self.routed(h, v, mask_Bm, self.scale)
            return self._spread([delta[..., a:b] for a, b in self._bounds()], bias)
        z = self.bottleneck(x, y_Bmd, mask_Bm, self.scale)
        if len(self.parts) == 1 and self.parts[0][1] == self.out_features:
            return F.linear(z, self.B, bias)
        ups = zip(z.split(self.r, -1), self.B.split([w for _, w in self.parts]), strict=True)
        return self._spread([F.linear(part, up) for part, up in ups], bias)

    def _up(self, h: Tensor) -> Tensor:
        ups = zip(h.split(self.r, -1), self.B.split([w for _, w in self.parts]), strict=True)
        return torch.cat([F.linear(part, up) for part, up in ups], -1)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        end = 0
        for _, width in self.parts:
            yield end, end + width
            end += width

    def _spread(self, pieces: list[Tensor], bias: Tensor | None) -> Tensor:
        out = spread(pieces, self.parts, self.out_features)
        return out if bias is None else out + bias

    @torch.no_grad()
    def weight(self) -> Tensor:
        """(out, d) change of the frozen weight; only plain, unrouted LoRA has one."""
        full = torch.zeros(self.out_features, self.A.shape[1], dtype=self.A.dtype, device=self.A.device)
        downs, ups = self.A.split(self.r), self.B.split([w for _, w in self.parts])
        for (start, width), down, up in zip(self.parts, downs, ups, strict=True):
            full[start : start + width] = up @ down * self.scale
        return full


class RoutedLoraLinear(nn.Module, SiteLayer):
    """A frozen Linear or Conv1D with routed low-rank paths beside it, one per adapter."""

    adapter_layer_names = ("routed_lora",)
    other_param_names = ("configs",)

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.in_features, self.out_features = features(base)
        self.routed_lora = nn.ModuleDict()
        self.configs: dict[str, RoutedLoraConfig] = {}

    def update_layer(self, adapter_name: str, place: Projections, config: RoutedLoraConfig, path: str) -> None:
        """Add an adapter. `path` names this projection in error messages."""
        self.path = path
        self.configs[adapter_name] = config
        self.routed_lora[adapter_name] = RoutedDelta(base_layer(self), place, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, L, d) -> (B, L, out); reads the condition of the running forward."""
        frozen = self._frozen()
        out = self.base_layer(x, *args, **kwargs)
        if frozen:
            return out
        for name in self.active_adapters:
            if name not in self.configs:
                continue
            delta = self.routed_lora[name]
            y, mask = routed_on(self.configs[name], x, self.path)
            added = delta(x, y, mask, self._frozen_bias(delta) if delta.has_bias else None)
            out = out + added if added.dtype == out.dtype else (out + added).to(out.dtype)
        return out

    def _frozen_bias(self, delta: RoutedDelta) -> Tensor:
        bias = self.base_layer._parameters.get("bias")
        return delta.frozen_bias if hasattr(bias, "ds_id") else bias

    def lora_factors(self, adapter_name: str) -> list[Product] | None:
        """Factors of plain LoRA, without route and trained bias."""
        if adapter_name not in self.configs:
            return []
        delta = self.routed_lora[adapter_name]
        if self.configs[adapter_name].routed or delta.has_bias:
            return None
        downs, ups = delta.A.split(delta.r), delta.B.split([width for _, width in delta.parts])
        starts = (start for start, _ in delta.parts)
        return [Product(*each) for each in zip(starts, downs, (up * delta.scale for up in ups), strict=True)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the change into the frozen weight (plain, unrouted LoRA only; the tuner refuses the rest)."""
        for name in self._start_merge(adapter_names):
            delta, base = self.routed_lora[name], self.base_layer
            self._fold(name, [(0, delta.out_features)], [delta.weight()], safe_merge)
            if delta.has_bias:
                with torch.no_grad():
                    base.bias += (delta.bias - self._unmerged["bias"]).to(base.bias.dtype)
