"""Bottleneck adapters: a small perceptron beside or after a sublayer. Shared by `adapter` and `uni_adapter`."""

# B batch, L length, d width of the model, r width of the bottleneck

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft_ds.distributed.partitioned import lent
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.fused import FusablePart
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.options import SUBLAYERS
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.methods.common.select import Selection
from mmpeft_ds.ops.precision import full_dtype

# For every name of `options.ACTIVATIONS`.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


class Down(nn.Linear):
    """d -> r, weights from N(0, 0.02), no bias to begin with."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class Up(Down):
    """r -> d, zero to begin with if `zero`, so that the model starts as the frozen one."""

    def __init__(self, *args: int, zero: bool, **kwargs: object):
        self.zero = zero
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero:
            nn.init.zeros_(self.weight)


def plus_bottleneck(out: Tensor, t: Tensor, down: Down, up: Up, activation: str, scale: float) -> Tensor:
    """`out + scale * up(activation(down(t)))` in the dtype of `out`, (B, L, d)."""
    added = up(FUNCTIONS[activation](down(at_edge(t, up.weight.dtype))))
    return (out + (added if scale == 1.0 else scale * added)).to(out.dtype)


class BottleneckLayer(nn.Module, SiteLayer, Multiplies, FusablePart):
    """The last module of a sublayer and, per adapter, what the bottleneck adds to its output:
    `scale * up(activation(down(t)))`, where t is that output, or the sublayer's input if the adapter is parallel.

    The layer owns its `up`; `down` may belong to another layer (one for all towers), and is then only referred to.

    Args:
        prefix: of the method's parameter names; they are `PATH.{prefix}_down.ADAPTER.weight` and `..._up...`.
    """

    tokenwise = True
    other_param_names = ("plans",)
    arithmetic = staticmethod(plus_bottleneck)

    def __init__(self, base: nn.Module, adapter_name: str, prefix: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.adapter_layer_names = (f"{prefix}_down", f"{prefix}_up")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        # (activation, scale, the layer that remembers the input or None, the layer that owns `down`) of each adapter;
        # a plain dict, so that the layers in it are no submodules of this one
        self.plans: dict[str, tuple[str, float, Remember | None, BottleneckLayer]] = {}

    @property
    def rowless(self) -> bool:
        """See `SiteLayer`; a parallel adapter remembers its input as it was before the rows were put together."""
        return all(remember is None for _, _, remember, _ in self.plans.values())

    @property
    def downs(self) -> nn.ModuleDict:
        """The `down` of each adapter that belongs to this layer."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def ups(self) -> nn.ModuleDict:
        """The `up` of each adapter."""
        return getattr(self, self.adapter_layer_names[1])

    def update_layer(
        self,
        adapter_name: str,
        config: PeftConfig,
        width: int,
        activation: str,
        like: Tensor,
        remember: Remember | None = None,
        owner: BottleneckLayer | None = None,
    ) -> None:
        """Add an adapter.

        Args:
            config: gives `r`, `scale`, `near_identity`.
            width: d.
            activation: a key of `FUNCTIONS`.
            like: a frozen parameter, whose device is taken, and whose dtype if it is float64; else float32.
            remember: knows the sublayer's input; None: the adapter comes after the sublayer.
            owner: the layer whose `down` is used; None: an own one.
        """
        dtype = full_dtype(like.dtype)
        where = {"dtype": dtype, "device": like.device}
        if owner is None:
            self.downs[adapter_name] = Down(width, config.r, **where)
        self.ups[adapter_name] = Up(config.r, width, zero=config.near_identity, **where)
        self.plans[adapter_name] = (activation, config.scale, remember, owner or self)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, L, any) -> (B, L, d)."""
        frozen = self._frozen()
        out = self.base_layer(x, *args, **kwargs)
        if frozen:
            return out
        for name in self.active_adapters:
            if name in self.plans:
                activation, scale, remember, owner = self.plans[name]
                if owner is not self:
                    lent(self, list(owner.downs[name].parameters()))
                t = out if remember is None else remember.take(name)
                with self.multiplying(t):
                    out = self.arithmetic(out, t, owner.downs[name], self.ups[name], activation, scale)
        return out


class Remember(nn.Module, SiteLayer):
    """The first module of a sublayer: keeps its input until the parallel adapter at the sublayer's end takes it.

    Attributes:
        users: adapters that will take it.
    """

    adapter_layer_names = ()
    other_param_names = ("users",)
    tokenwise = True

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.users: dict[str, bool] = {}
        self._kept: dict[str, Tensor] = {}

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Serve one more adapter."""
        self.users[adapter_name] = True
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def take(self, adapter_name: str) -> Tensor:
        """The input of the running sublayer; it is forgotten with that."""
        return self._kept.pop(adapter_name)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The output of the frozen module."""
        if not self._disable_adapters:
            self._kept = {name: x for name in self.active_adapters if name in self.users}
        return self.base_layer(x, *args, **kwargs)


@dataclass(frozen=True)
class Sublayer:
    """Place of a bottleneck.

    Attributes:
        end: path of the last module before the residual add.
        first: path of the projection that reads the sublayer's input.
        width: of the residual stream.
        layer: index in the tower.
        activation: of the feed-forward block in the same layer.
    """

    end: str
    first: str
    width: int
    layer: int
    activation: str | None


def sublayers(chosen: Selection, after: list[str] | None) -> list[Sublayer]:
    """The sublayers of the chosen sites; `after` says which of `SUBLAYERS`, None takes those that there are.

    Raises:
        BadInput: a kind of sublayer that no chosen layer has.
    """
    activation = {site.block: site.activation for site in chosen.ffn}
    places = []
    for kind in after or SUBLAYERS:
        sites = chosen.ffn if kind == "ffn" else [s for s in chosen.attention if s.cross == (kind == "cross")]
        if not sites and after:
            raise BadInput(
                f"after: tower {', '.join(map(repr, chosen.towers))} has no {kind!r} sublayer. Leave it out."
            )
        for s in sites:
            first, last = (s.up, s.down) if kind == "ffn" else (s.q, s.out)
            places.append(Sublayer(s.end, first.path, last.width, s.layer, activation.get(s.block)))
    return places


def activation_of(wanted: str | None, place: Sublayer) -> str:
    """The wanted non-linearity, or that of the backbone. Raises BadInput where it is not one of `FUNCTIONS`."""
    name = wanted or place.activation
    if name is None or name not in FUNCTIONS:
        raise BadInput(f"activation: the backbone's at {place.end} is {name!r}. Name one of {', '.join(FUNCTIONS)}.")
    return name
