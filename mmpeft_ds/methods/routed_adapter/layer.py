"""Layers of routed adapters: the bottleneck after a sublayer."""

# B batch, L text length, m conditioning tokens, d width of the model

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.methods.common.bottleneck import FUNCTIONS
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.products import at_edge
from mmpeft_ds.methods.common.routed import Bottleneck, routed_on
from mmpeft_ds.methods.routed_adapter.config import RoutedAdapterConfig

STD = 0.02  # of both projections, as the published backbones initialise them


@dataclass(frozen=True)
class AdapterPlace:
    """The sublayer after which an adapter is placed.

    Attributes:
        width: of its result.
        activation: a key of `ACTIVATIONS`.
        residual: add its result to the adapter's.
        like: path of a frozen projection, for device and dtype.
        owner: path of the layer whose adapter it uses; its own path unless the adapter is shared.
    """

    width: int
    activation: str
    residual: bool
    like: str
    owner: str


class RoutedPath(Bottleneck):
    """One adapter: `down`, route, non-linearity, `up`.

    Args:
        config: of the adapter.
        place: where it stands.
        like: a frozen weight, for device and dtype.
    """

    def __init__(self, config: RoutedAdapterConfig, place: AdapterPlace, like: Tensor):
        super().__init__(config, place.width, like, bias=True)
        self.activation, self.residual = place.activation, place.residual
        self.B, self.up_bias = self.parameter(place.width, config.r), self.parameter(place.width)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Both projections from N(0, 0.02), biases zero, as published: the layer does not start as the frozen one."""
        self.reset_bottleneck(STD)
        nn.init.normal_(self.B, std=STD)
        self.up_bias.zero_()

    def forward(self, x_BLd: Tensor, y_Bmd: Tensor | None, mask_Bm: Tensor | None) -> Tensor:
        """(B, L, d) what takes the place of the sublayer's result `x_BLd`, in the dtype of its products."""
        dtype = self.B.dtype
        with self.multiplying(x_BLd):
            x = at_edge(x_BLd, dtype)
            z = self.bottleneck(x, None if y_Bmd is None else at_edge(y_Bmd, dtype), mask_Bm)
            out = F.linear(FUNCTIONS[self.activation](z), self.B, self.up_bias)
        return out + x if self.residual else out


class RoutedAdapterLayer(nn.Module, SiteLayer):
    """The last module of a sublayer and, per adapter, the bottleneck after it.

    Where an adapter is shared, one layer owns it and the others only refer to it, so its parameters exist once.
    Several active adapters follow each other.
    """

    adapter_layer_names = ("routed_adapter",)
    other_param_names = ("configs", "owners")

    def __init__(self, base: nn.Module, adapter_name: str, path: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.path = path
        self.routed_adapter = nn.ModuleDict()
        self.configs: dict[str, RoutedAdapterConfig] = {}
        # a plain dict, so that another layer in it is no submodule of this one
        self.owners: dict[str, RoutedAdapterLayer] = {}

    @property
    def tokenwise(self) -> bool:
        """`SiteLayer.tokenwise` of the active adapters."""
        return all(self.configs[n].tokenwise for n in self.active_adapters if n in self.configs)

    def update_layer(
        self,
        adapter_name: str,
        place: AdapterPlace,
        config: RoutedAdapterConfig,
        like: Tensor,
        owner: RoutedAdapterLayer | None,
    ) -> None:
        """Add an adapter, or refer to that of `owner`."""
        self.configs[adapter_name] = config
        self.owners[adapter_name] = owner or self
        if owner is None:
            self.routed_adapter[adapter_name] = RoutedPath(config, place, like)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, L, any) -> (B, L, d); reads the condition of the running forward."""
        frozen = self._frozen()
        out = self.base_layer(x, *args, **kwargs)
        if frozen:
            return out
        for name in self.active_adapters:
            if name in self.configs:
                y, mask = routed_on(self.configs[name], out, self.path)
                out = self.owners[name].routed_adapter[name](out, y, mask).to(out.dtype)
        return out
