"""Layers of routed LoRA: the low-rank path of a projection."""

# B batch, L text length, m conditioning tokens, d in width, o width of a part, g parts of a fused projection, r rank

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods._layers import SiteLayer, gathered
from mmpeft_ds.methods.routed_lora.config import RoutedLoraConfig
from mmpeft_ds.ops.route import pool_condition, route
from mmpeft_ds.sites.base import base_layer, features
from mmpeft_ds.sites.condition import Condition, current


@dataclass(frozen=True)
class Projections:
    """What is adapted of one Linear or Conv1D.

    Attributes:
        parts: (first output feature, width) of each adapted part; one unless the projection is fused.
        train_bias: train a copy of its bias too.
    """

    parts: tuple[tuple[int, int], ...]
    train_bias: bool = False


class RoutedDelta(nn.Module):
    """The low-rank path of one adapter on one projection: `down`, route, `up`, and the trained bias.

    Its parameters are its own, so DeepSpeed's hooks on this module gather them.

    Args:
        base: the frozen Linear or Conv1D.
        place: which output features it adds to, and whether the bias trains.
        config: of the adapter.
    """

    def __init__(self, base: nn.Module, place: Projections, config: RoutedLoraConfig):
        super().__init__()
        parts = place.parts
        d, self.out_features = features(base)
        g, r = len(parts), config.r
        self.parts, self.r, self.dropout = parts, r, config.dropout
        self.scale = config.alpha / r
        self.kind, self.variant, self.reshape_compat = config.route, config.variant, config.reshape_compat
        self.blocks = g if not config.coupled else 1
        weight = base.weight
        # Trained in float32 whatever the base is; float64 stays float64, which reference vectors need.
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=weight.device))

        if config.variant in ("plain", "after_up"):
            self.A = parameter(g * r, d)
        else:
            quarter = g * r // 4
            self.A_text, self.A_image = parameter(quarter, d), parameter(quarter, d)
            if config.variant == "split":
                self.U_text, self.U_image = parameter(g * r, quarter), parameter(g * r, quarter)
            else:
                self.U = parameter(g * r, quarter)
            if config.variant == "split_merge_ln":
                self.norm_weight, self.norm_bias = parameter(quarter), parameter(quarter)
        self.B = parameter(sum(width for _, width in parts), r)
        self.reset()
        bias = base._parameters.get("bias") if place.train_bias else None
        self.has_bias = bias is not None
        if bias is not None:
            with gathered([bias]):
                self.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
                # Under ZeRO-3 the frozen bias may be away when this path needs it.
                self.register_buffer("frozen_bias", bias.detach().clone(), persistent=False)
        else:
            self.bias = None

    @torch.no_grad()
    def reset(self) -> None:
        """`down` Kaiming uniform, `up` zero: the layer starts as the frozen one."""
        for name, parameter in self.named_parameters():
            if name.startswith(("A", "U")):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        self.B.zero_()
        if self.variant == "split_merge_ln":
            self.norm_weight.fill_(1.0)
            self.norm_bias.zero_()

    def forward(self, x_BLd: Tensor, y_Bmd: Tensor | None, base_bias: Tensor | None) -> Tensor:
        """What is added to the frozen output, (B, L, out); the trained bias replaces `base_bias`."""
        dtype = self.B.dtype
        x = x_BLd if x_BLd.dtype == dtype else x_BLd.to(dtype)
        if y_Bmd is not None and y_Bmd.dtype != dtype:
            y_Bmd = y_Bmd.to(dtype)
        if self.dropout and self.training:
            y_Bmd = None if y_Bmd is None else F.dropout(y_Bmd, self.dropout)
            x = F.dropout(x, self.dropout)
        bias = self.bias - base_bias if self.has_bias else None
        if self.variant == "after_up":
            delta = self._route(self._up(F.linear(x, self.A)), self._up(F.linear(y_Bmd, self.A))) * self.scale
            return self._spread([delta[..., a:b] for a, b in self._bounds()], bias)
        z = self._bottleneck(x, y_Bmd)
        if len(self.parts) == 1 and self.parts[0][1] == self.out_features:
            return F.linear(z, self.B, bias)
        ups = zip(z.split(self.r, -1), self.B.split([w for _, w in self.parts]), strict=True)
        return self._spread([F.linear(part, up) for part, up in ups], bias)

    def _bottleneck(self, x: Tensor, y: Tensor | None) -> Tensor:
        """(B, L, g r), already scaled."""
        if self.variant == "plain":
            h = F.linear(x, self.A)
            if y is None:
                return self._scaled(h)
            return self._route(h, F.linear(y, self.A), self.scale)
        h, v = F.linear(x, self.A_text), F.linear(y, self.A_image)
        if self.variant == "split":
            return self._route(F.linear(h, self.U_text), F.linear(v, self.U_image), self.scale)
        z = self._route(h, v)
        if self.variant == "split_merge_ln":
            z = F.layer_norm(z + h, z.shape[-1:], self.norm_weight, self.norm_bias, 1e-5)
        return self._scaled(F.linear(z, self.U))

    def _route(self, h: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
        """Route over the whole width, or over each part on its own."""
        if scale != 1.0 and self.kind == "mul":
            v, scale = v * scale, 1.0  # v has few rows
        n = h.shape[-1] // self.blocks
        pairs = [(h, v)] if self.blocks == 1 else zip(h.split(n, -1), v.split(n, -1), strict=True)
        routed = [route(self.kind, a, b, reshape_compat=self.reshape_compat) for a, b in pairs]
        z = routed[0] if len(routed) == 1 else torch.cat(routed, -1)
        return z if scale == 1.0 else z * scale

    def _scaled(self, z: Tensor) -> Tensor:
        return z if self.scale == 1.0 else z * self.scale

    def _up(self, h: Tensor) -> Tensor:
        ups = zip(h.split(self.r, -1), self.B.split([w for _, w in self.parts]), strict=True)
        return torch.cat([F.linear(part, up) for part, up in ups], -1)

    def _bounds(self) -> Iterator[tuple[int, int]]:
        end = 0
        for _, width in self.parts:
            yield end, end + width
            end += width

    def _spread(self, pieces: list[Tensor], bias: Tensor | None) -> Tensor:
        """Place each part at its output features, zeros elsewhere."""
        columns, at = [], 0
        like = pieces[0]
        for (start, width), piece in sorted(zip(self.parts, pieces, strict=True), key=lambda pair: pair[0]):
            if start > at:
                columns.append(like.new_zeros(1).expand(*like.shape[:-1], start - at))
            columns.append(piece)
            at = start + width
        if at < self.out_features:
            columns.append(like.new_zeros(1).expand(*like.shape[:-1], self.out_features - at))
        out = columns[0] if len(columns) == 1 else torch.cat(columns, -1)
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
            y = self._condition(x, self.configs[name])
            added = delta(x, y, self._frozen_bias(delta) if delta.has_bias else None)
            out = out + added if added.dtype == out.dtype else (out + added).to(out.dtype)
        return out

    def _frozen_bias(self, delta: RoutedDelta) -> Tensor:
        bias = self.base_layer._parameters.get("bias")
        return delta.frozen_bias if hasattr(bias, "ds_id") else bias

    def _condition(self, x: Tensor, config: RoutedLoraConfig) -> Tensor | None:
        """(B, m, d) what this layer routes on."""
        if not config.routed:
            return None
        if config.condition == "self":
            return x
        condition = current()
        if config.condition == "self_mean":
            mask = None if condition is None else condition.expand_to(x.shape[0]).own_mask
            return pool_condition(x, mask, "mean")
        condition = Condition() if condition is None else condition.expand_to(x.shape[0])
        given = config.condition == "given"
        tokens, mask = (condition.tokens, condition.mask) if given else (condition.encoder, condition.encoder_mask)
        if tokens is None:
            what = "a condition" if given else "encoder states"
            raise BadInput(
                f"{self.path}: routes on {what}, but none was published. Run the forward inside "
                "mmpeft_ds.sites.condition.conditioned(...); with activation checkpointing, turn it on with "
                "mmpeft_ds.sites.condition.enable_checkpointing."
            )
        if tokens.shape[-1] != self.in_features:
            raise BadInput(
                f"{self.path}: the condition is {tokens.shape[-1]} wide, this layer takes {self.in_features}. "
                "Routing shares one `down` between both: choose towers of equal width."
            )
        how = config.pool if given else {"cross": "all", "cross_mean": "mean"}[config.condition]
        return pool_condition(tokens, mask, how)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the change into the frozen weight (plain, unrouted LoRA only; the tuner refuses the rest)."""
        for name in self._start_merge(adapter_names):
            delta, base = self.routed_lora[name], self.base_layer
            change = delta.weight()
            if safe_merge and not torch.isfinite(change).all():
                raise ValueError(f"{self.path}: adapter {name!r} is not finite and was not merged")
            with torch.no_grad():
                base.weight += (change.T if type(base).__name__ == "Conv1D" else change).to(base.weight.dtype)
                if delta.has_bias:
                    base.bias += (delta.bias - self._unmerged["bias"]).to(base.bias.dtype)
            self.merged_adapters.append(name)
