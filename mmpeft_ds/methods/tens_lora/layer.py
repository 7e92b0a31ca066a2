"""Layers of TensLoRA: the factors of one tensor, and the slices of it that a projection adds."""

# D width of the input, O width of the output or of one head of it, R ranks

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.methods.common.beside import Added, is_eager, with_added
from mmpeft_ds.methods.common.borrowed import whole
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.low_rank import Product
from mmpeft_ds.methods.common.parts import spread
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.methods.tens_lora.config import TensLoraConfig
from mmpeft_ds.ops import tensor_update
from mmpeft_ds.ops.beside_linear import Onto
from mmpeft_ds.ops.middle_sum import plus_middle
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.sites.base import base_layer, features
from mmpeft_ds.sites.once import once


@dataclass(frozen=True)
class Slice:
    """A slice of a tensor, which is one update.

    Attributes:
        tensor: what tells this tensor from others of the adapter.
        sizes: of its modes: input, output, then those that the config aggregates.
        rows: index in the modes of projections and layers, as far as the tensor has them.
    """

    tensor: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Slices:
    """The updates of one Linear or Conv1D: (first output feature, width) of each part, and its slice."""

    parts: tuple[tuple[int, int], ...]
    slices: tuple[Slice, ...]


class Factors(nn.Module):
    """The factors of one tensor and, in Tucker form, its core. The first leaf that needs them holds them.

    The tensor starts at zero: by its core, or in CP form by the factor of the input.
    """

    def __init__(self, sizes: tuple[int, ...], config: TensLoraConfig, like: Tensor):
        super().__init__()
        dtype, ranks = full_dtype(like.dtype), config.ranks
        tucker = config.form == "tucker"
        empty = [torch.empty(n, r, dtype=dtype, device=like.device) for n, r in zip(sizes, ranks, strict=True)]
        self.factors = nn.ParameterList(empty)
        self.core = nn.Parameter(torch.zeros(*ranks, dtype=dtype, device=like.device)) if tucker else None
        for factor in self.factors if tucker else self.factors[1:]:
            _start(factor, config, len(sizes))
        if not tucker:
            nn.init.zeros_(self.factors[0])

    def middle(self, rows: tuple[int, ...]) -> Tensor:
        """Of the Tucker form without a mode of heads, what stands between the factors of input and output for these
        rows of the others: one product a forward gives it for all rows, where nothing is in parts (ZeRO-3)."""
        *tables, core = whole([*self.factors[2:], self.core])

        def alone() -> Tensor:
            return tensor_update.tucker_slice(core, [table[row] for table, row in zip(tables, rows, strict=True)])

        if hasattr(self.core, "ds_id"):
            return alone()
        at = 0
        for table, row in zip(tables, rows, strict=True):
            at = at * len(table) + row
        return once(self, at, lambda: tensor_update.tucker_slices(core, tables), alone)


def _start(factor: nn.Parameter, config: TensLoraConfig, modes: int) -> None:
    if config.start == "orthogonal":
        nn.init.orthogonal_(factor)
    elif config.start == "kaiming_uniform":
        nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
    else:  # variance as in the released code: of the whole tensor about 1 if its core were normal too
        tucker = config.form == "tucker"
        entries = math.prod(config.ranks) if tucker else config.ranks[0]
        nn.init.normal_(factor, std=math.sqrt(1 / entries) ** (1 / (modes + tucker)))


class TensorDelta(Fusable, Multiplies):
    """The update of one leaf by one adapter: a slice of a tensor for each part.

    Args:
        held: the factors of each slice of `place`, in their order.
    """

    def __init__(self, place: Slices, config: TensLoraConfig, held: list[Factors]):
        super().__init__()
        self.place, self.form, self.heads = place, config.form, "heads" in config.modes
        self.scale, self.dropout = config.scale, config.dropout
        self.borrowed = tuple(held)  # a tuple: no submodules, so they are named, saved and counted once

    def joins(self, x: Tensor) -> bool:
        """Whether `forward` may add itself to the leaf's output, if that is of the dtype of `x`: slices in Tucker form
        without a mode of heads, all in one dtype, without dropout, not compiled."""
        plain = self.form == "tucker" and not self.heads and not (self.dropout and self.training)
        return plain and is_eager(self, x, self.borrowed[0].factors[0].dtype)

    def forward(self, x: Tensor, onto: Onto | None = None) -> list[Tensor] | Tensor:
        """(..., D) -> (..., width) of each part, in the dtype of the products.

        Args:
            onto: what the parts are added to, where it `joins`; the sum, (..., out), is returned then.
        """
        if onto is not None:
            for held, piece, part in zip(self.borrowed, self.place.slices, self.place.parts, strict=True):
                down, up = whole(held.factors[:2])
                middle = held.middle(piece.rows)
                middle = middle if self.scale == 1.0 else middle * self.scale
                onto = plus_middle(onto, x, down.T, middle, up, part=part)
            return onto
        factors = [whole([*held.factors] + ([held.core] if held.core is not None else [])) for held in self.borrowed]
        with self.multiplying(x):
            x = at_edge(x, factors[0][0].dtype)
            if self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            added = [self._slice(x, given, piece) for given, piece in zip(factors, self.place.slices, strict=True)]
        return added if self.scale == 1.0 else [part * self.scale for part in added]

    def _slice(self, x: Tensor, given: list[Tensor], piece: Slice) -> Tensor:
        modes = len(piece.sizes)
        down, up = given[:2]
        heads = given[2] if self.heads else None
        rows = [factor[row] for factor, row in zip(given[2 + self.heads : modes], piece.rows, strict=True)]
        if self.form == "cp":
            return tensor_update.cp_delta(x, down, up, rows, heads)
        return tensor_update.tucker_delta(x, down, up, tensor_update.tucker_slice(given[modes], rows), heads)

    def thin_products(self) -> list[Product]:
        """The change of each part as a product; its rank is that of the mode of inputs."""
        pairs = []
        for (start, _), piece, held in zip(self.place.parts, self.place.slices, self.borrowed, strict=True):
            down = held.factors[0]
            eye = torch.eye(down.shape[1], dtype=down.dtype, device=down.device)
            core = [] if held.core is None else [held.core]
            up = self._slice(eye, [eye, *held.factors[1:], *core], piece).T * self.scale
            pairs.append(Product(start, down.T, up))
        return pairs

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """The change of each part of the weight, (width, D)."""
        down = self.borrowed[0].factors[0]
        eye = torch.eye(down.shape[0], dtype=down.dtype, device=down.device)
        training = self.training
        self.eval()  # the changes of weights have no dropout
        changes = [added.T for added in self(eye)]
        self.train(training)
        return changes


class TensLoraLinear(nn.Module, SiteLayer):
    """A frozen Linear or Conv1D with slices of tensors beside it, one set for each adapter."""

    adapter_layer_names = ("tens_lora", "tens_lora_shared")
    tokenwise = rowless = True

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.out_features = features(base_layer(base))[1]
        self.tens_lora = nn.ModuleDict()
        self.tens_lora_shared = nn.ModuleDict()

    def update_layer(
        self, adapter_name: str, place: Slices, config: TensLoraConfig, shared: dict[tuple, Factors], path: str
    ) -> None:
        """Add an adapter.

        Args:
            shared: the adapter's factors so far, by tensor; what is missing is made and held here.
            path: of this leaf, for error messages.
        """
        self.path = path
        own = nn.ModuleList()
        for piece in place.slices:
            if piece.tensor not in shared:
                shared[piece.tensor] = Factors(piece.sizes, config, base_layer(self).weight)
                own.append(shared[piece.tensor])
        if len(own):
            self.tens_lora_shared[adapter_name] = own
        delta = TensorDelta(place, config, [shared[piece.tensor] for piece in place.slices])
        self.tens_lora[adapter_name] = delta.train(self.base_layer.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(..., D) -> (..., out)."""
        active = [] if self._frozen() else [self.tens_lora[n] for n in self.active_adapters if n in self.tens_lora]
        return with_added(self.base_layer, x, [self._added(delta, x) for delta in active], *args, **kwargs)

    def _added(self, delta: TensorDelta, x: Tensor) -> Added:
        alone = lambda: spread(delta(x), delta.place.parts, self.out_features)  # noqa: E731
        return Added(delta.joins(x), lambda onto: delta(x, onto), alone)

    def lora_factors(self, adapter_name: str) -> list[Product]:
        """Slices of tensors, between the factor of inputs and the rest."""
        return self.tens_lora[adapter_name].thin_products() if adapter_name in self.tens_lora else []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold what the adapters add into the frozen weight; exact in evaluation."""
        for name in self._start_merge(adapter_names, ("weight",)):
            delta = self.tens_lora[name]
            self._fold(name, delta.place.parts, delta.weights(), safe_merge)
