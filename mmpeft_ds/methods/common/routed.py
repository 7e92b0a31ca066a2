"""The routed bottleneck of routed LoRA and routed adapters: where it may stand, what it routes on, its parameters."""

# B batch, L text length, m conditioning tokens, d in width, g parts of a fused projection, r rank, w = g r

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import MethodConfig
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.options import IN_A_QUARTER, RoutedOptions
from mmpeft_ds.methods.common.products import Multiplies
from mmpeft_ds.methods.common.select import Selection, select
from mmpeft_ds.ops.bottleneck_attention import bottleneck_attention
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.route import MIXES_TOKENS, pool_condition, route
from mmpeft_ds.sites import Sites
from mmpeft_ds.sites.condition import Condition, current


@dataclass
class RoutedConfig(RoutedOptions, MethodConfig):
    """Base of the peft configs of methods with a routed bottleneck."""

    @property
    def tokenwise(self) -> bool:
        """Whether a token's output depends on that token alone (and the condition)."""
        own = self.routed and self.condition in ("self", "self_mean")
        return not own and (self.route not in MIXES_TOKENS or self.variant == "cross_attention")


def selected(config: RoutedConfig, sites: Sites, cross_only: bool) -> Selection:
    """The sites that `config` means. Raises BadInput where it cannot be attached to them, whatever the condition.

    Args:
        cross_only: a config that routes on encoder states attaches to cross-attention alone.
    """
    on_states = config.condition.startswith("cross")
    chosen = select(sites, config.tower, config.layers, cross_only=on_states)
    if on_states and not cross_only:
        chosen = select(sites, config.tower, config.layers)
    if not config.tokenwise and not config.reshape_compat and any(s.causal for s in chosen.attention):
        what = f"route: {config.route!r}" if config.route in MIXES_TOKENS else f"condition: {config.condition!r}"
        raise BadInput(
            f"{what} mixes all tokens, so a causal tower would see its future. Choose another; reshape_compat: true "
            "reproduces the published one, leak included."
        )
    return chosen


def check_condition(config: RoutedConfig, widths: dict[str, int], condition_width: int | None) -> None:
    """Refuse a published condition that is missing or not as wide as what routes on it.

    Args:
        widths: width of the input of each routed layer by path.

    Raises:
        BadInput: in one line.
    """
    if not config.routed or config.condition != "given":
        return
    what = f"route: {config.route!r}" if config.variant != "cross_attention" else "variant: 'cross_attention'"
    if condition_width is None:
        raise BadInput(
            f"{what} needs a condition, which this backbone does not publish. "
            "Give the backbone one, or set route: none."
        )
    for path, width in widths.items():
        if width != condition_width:
            raise BadInput(
                f"{what} shares one width between text and image, but {path} takes width {width} and the condition "
                f"has {condition_width}. Choose towers of equal width, or route: none."
            )


def routed_on(config: RoutedConfig, x: Tensor, path: str) -> tuple[Tensor | None, Tensor | None]:
    """(B, m, d) what the layer at `path` routes on when it gets `x`, and (B, m) which of it counts, None for all.

    Raises:
        BadInput: if nothing was published, or something of another width.
    """
    if not config.routed:
        return None, None
    if config.condition == "self":
        return x, None
    condition = current()
    if config.condition == "self_mean":
        mask = None if condition is None else condition.expand_to(x.shape[0]).own_mask
        return pool_condition(x, mask, "mean"), None
    condition = Condition() if condition is None else condition.expand_to(x.shape[0])
    given = config.condition == "given"
    tokens, mask = (condition.tokens, condition.mask) if given else (condition.encoder, condition.encoder_mask)
    if tokens is None:
        what = "a condition" if given else "encoder states"
        raise BadInput(
            f"{path}: routes on {what}, but none was published. Run the forward inside "
            "mmpeft_ds.sites.condition.conditioned(...); with activation checkpointing, turn it on with "
            "mmpeft_ds.sites.condition.enable_checkpointing."
        )
    if tokens.shape[-1] != x.shape[-1]:
        raise BadInput(
            f"{path}: the condition is {tokens.shape[-1]} wide, this layer takes {x.shape[-1]}. "
            "Routing shares one width between both: choose towers of equal width."
        )
    how = config.pool if given else {"cross": "all", "cross_mean": "mean"}[config.condition]
    # Published layers route on all encoder states, padding included; a given condition says itself what counts.
    return pool_condition(tokens, mask, how), mask if given and how == "all" else None


class Bottleneck(Fusable, Multiplies):
    """`down` and the route, in every variant; a subclass brings `up`.

    Its parameters are its own, so DeepSpeed's hooks on the module gather them.

    Args:
        config: of the adapter.
        width: of the input and of the condition.
        parts: g, each r wide.
        blocks: groups of parts that are routed on their own.
        like: the frozen weight; trainables are on its device and float32, or float64 like it.
        bias: `down` has one, added to text and condition alike.
    """

    def __init__(
        self, config: RoutedConfig, width: int, like: Tensor, parts: int = 1, blocks: int = 1, bias: bool = False
    ):
        super().__init__()
        self.r, self.kind, self.variant, self.heads = config.r, config.route, config.variant, config.heads
        self.blocks, self.reshape_compat = blocks, config.reshape_compat
        self._like = (full_dtype(like.dtype), like.device)
        w = parts * config.r
        inner = w // 4 if config.variant in IN_A_QUARTER else w
        if config.variant == "cross_attention" and inner % config.heads:
            raise BadInput(
                f"heads: {config.heads} do not divide the bottleneck of width {inner} ({parts} x r / 4). "
                "Choose another r or heads."
            )
        if config.variant in IN_A_QUARTER:
            self.A_text, self.A_image = self.parameter(inner, width), self.parameter(inner, width)
            if config.variant == "split":
                self.U_text, self.U_image = self.parameter(w, inner), self.parameter(w, inner)
            else:
                self.U = self.parameter(w, inner)
            if config.variant == "split_merge_ln":
                self.norm_weight, self.norm_bias = self.parameter(inner), self.parameter(inner)
            if config.variant == "cross_attention":
                for name in ("W_q", "W_k", "W_v", "W_out"):
                    setattr(self, name, self.parameter(inner, inner))
        else:
            self.A = self.parameter(w, width)
        self.down_bias = self.parameter(w if config.variant == "split" else inner) if bias else None

    def parameter(self, *shape: int) -> nn.Parameter:
        """An empty trainable."""
        dtype, device = self._like
        return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))

    @torch.no_grad()
    def reset_bottleneck(self, std: float | None = None) -> None:
        """Matrices from N(0, std), or Kaiming uniform as LoRA has them; norm one, biases zero."""
        for name, parameter in self.named_parameters():
            if name.startswith(("A", "U", "W_")):
                if std is None:
                    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                else:
                    nn.init.normal_(parameter, std=std)
        if self.down_bias is not None:
            self.down_bias.zero_()
        if self.variant == "split_merge_ln":
            self.norm_weight.fill_(1.0)
            self.norm_bias.zero_()

    def bottleneck(self, x: Tensor, y: Tensor | None, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """(B, L, w) the routed bottleneck, times `scale`.

        Args:
            x: (B, L, d).
            y: (B, m, d), None without routing.
            mask: (B, m), True = keep; a token that is not kept routes as zero.
        """
        b = self.down_bias
        if self.variant == "plain":
            h = F.linear(x, self.A, b)
            if self.kind == "none":
                return scaled(h, scale)
            return self.routed(h, F.linear(y, self.A, b), mask, scale)
        if self.variant == "split":
            h, v = (F.linear(F.linear(t, a), u, b) for t, a, u in self._pairs(x, y))
            return self.routed(h, v, mask, scale)
        h, v = F.linear(x, self.A_text, b), F.linear(y, self.A_image, b)
        if self.variant == "cross_attention":
            weights = (self.W_q, self.W_k, self.W_v, self.W_out)
            z = _text_by_text(lambda h, v: bottleneck_attention(h, v, weights, self.heads, mask), h, v)
        else:
            z = self.routed(h, v, mask)
        if self.variant == "split_merge_ln":
            z = F.layer_norm(z + h, z.shape[-1:], self.norm_weight, self.norm_bias, 1e-5)
        return scaled(F.linear(z, self.U), scale)

    def routed(self, h: Tensor, v: Tensor, mask: Tensor | None, scale: float = 1.0) -> Tensor:
        """Route over the whole width, or over each block on its own.

        Args:
            h: (B, L, n) bottleneck of the text, n a multiple of the number of blocks.
            v: (B, m, n) bottleneck of the condition.
            mask: (B, m) True = keep; None keeps all tokens of the condition.
            scale: factor of the result.

        Returns:
            (B, L, n).
        """
        if mask is not None:
            # after `down`, whose bias a padded token would bring along
            v = torch.where(mask.bool().unsqueeze(-1), v, 0)
        if scale != 1.0 and self.kind == "mul":
            v, scale = v * scale, 1.0  # v has few rows
        return scaled(_text_by_text(self._route, h, v), scale)

    def _route(self, h: Tensor, v: Tensor) -> Tensor:
        n = h.shape[-1] // self.blocks
        pairs = [(h, v)] if self.blocks == 1 else zip(h.split(n, -1), v.split(n, -1), strict=True)
        pieces = [route(self.kind, a, b, reshape_compat=self.reshape_compat) for a, b in pairs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    def _pairs(self, x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        return (x, self.A_text, self.U_text), (y, self.A_image, self.U_image)


def _text_by_text(combine: Callable[[Tensor, Tensor], Tensor], h: Tensor, v: Tensor) -> Tensor:
    """`combine(h, v)` with a row of `h` for each row of `v`, also where the tower reads all texts as one row; there
    the bottleneck, which is narrow, gets its padding back."""
    # Compiled code cannot ask for the condition; engine.compile is refused with packed texts.
    condition = None if torch.compiler.is_compiling() else current()
    segments = None if condition is None else condition.segments
    return combine(h, v) if segments is None else segments.join(combine(segments.split(h), v))


def scaled(z: Tensor, scale: float) -> Tensor:
    """`z` times `scale`, without a product by one."""
    return z if scale == 1.0 else z * scale
