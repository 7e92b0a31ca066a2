"""Layers that several methods share: adapter verbs, exact merging, trained copies of norms and biases."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.fused import Fusable, FusablePart
from mmpeft_ds.methods.common.low_rank import Product, joined
from mmpeft_ds.methods.common.parts import fold
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.sites.base import AdapterLayer, base_layer, features


class SiteLayer(BaseTunerLayer, AdapterLayer):
    """A wrapper around one module of the frozen model; a subclass is an `nn.Module` as well, made first.

    Args:
        base: the frozen module.

    Attributes:
        path: full path of the module, for error messages; layers that merge set it.
    """

    path: str = ""

    def __init__(self, base: nn.Module, adapter_name: str):
        self.base_layer = base
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged: dict[str, Tensor] | None = None

    def _start_merge(self, adapter_names: list[str] | None, changes: tuple[str, ...] | None = None) -> list[str]:
        """Adapters to merge; keeps the frozen tensors that merging `changes` (all of them by default)."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self._get_available_adapters()]
        if names and self._unmerged is None:
            # Kept whole: subtracting the change again would not restore the bits.
            kept = self.base_layer.named_parameters()
            self._unmerged = {k: p.detach().clone() for k, p in kept if changes is None or k in changes}
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the frozen weights: change those of each name that `_start_merge` gives, and append it to
        `merged_adapters`; `_frozen` then tells `forward` to run the base alone.

        Default: raise BadInput, for layers whose tuner says in `unmergeable` why they cannot.
        """
        raise BadInput(
            f"{type(self).__name__} defines no `merge`, so its adapters cannot be merged. Keep them as adapters, or "
            "write it; where it cannot be written, `unmergeable` of the tuner says why."
        )

    def _fold(
        self, adapter_name: str, parts: Sequence[tuple[int, int]], changes: Sequence[Tensor], safe_merge: bool
    ) -> None:
        """Add the change of each part, (width, in), to the frozen weight, and note that the adapter is merged.

        Raises:
            ValueError: with `safe_merge`, for a change that is not finite; nothing is added then.
        """
        if safe_merge and not all(torch.isfinite(change).all() for change in changes):
            raise ValueError(f"{self.path}: adapter {adapter_name!r} is not finite and was not merged")
        fold(self.base_layer, parts, changes)
        self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Restore the frozen tensors bit for bit."""
        if self._unmerged is not None:
            with torch.no_grad():
                for name, frozen in self._unmerged.items():
                    self.base_layer.get_parameter(name).copy_(frozen)
        self._unmerged = None
        self.merged_adapters = []

    def lora_factors(self, adapter_name: str) -> list[Product] | None:
        """The change of the frozen weight, part by part, where it is a product of two thin matrices in evaluation and
        nothing else changes: such an adapter can be written as a LoRA. Called without gradient; an adapter that this
        layer does not have changes nothing, an empty list.

        Default: None, it is no such change.
        """
        return None

    @torch.no_grad()
    def lora_pair(self, adapter_name: str) -> tuple[Tensor, Tensor] | None:
        """`lora_factors` as one pair, (r, in) and (out, r); None where there is none."""
        products = self.lora_factors(adapter_name)
        return joined(products, features(base_layer(self))[1]) if products else None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `get_delta_weight` is the whole effect of the adapter; asked by peft."""
        with torch.no_grad():
            return self.lora_factors(adapter_name) is not None

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the frozen weight, in the layout in which the weight is stored."""
        frozen = base_layer(self)
        pair = self.lora_pair(adapter_name)
        change = torch.zeros(*features(frozen)[::-1]) if pair is None else pair[1] @ pair[0]
        return change.T if type(frozen).__name__ == "Conv1D" else change

    def _frozen(self) -> bool:
        """Whether the base runs alone."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        return self._disable_adapters or self.merged


class KeepsBuffers(nn.Module):
    """Base of a module with buffers that were drawn or computed when it was attached, and do not train.

    Attributes:
        kept: their names. They are not persistent, and travel with checkpoints, so that a resumed run finds them
            as they were, also on another machine.
    """

    kept: tuple[str, ...] = ()


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that checkpoints keep, of all modules of `model`, by their full paths."""
    left = [model]
    while left and not isinstance(left[-1], KeepsBuffers):
        left += (m for m in left.pop()._modules.values() if m is not None)  # `children` takes half the time of names
    if not left:  # few methods have any, and a walk with names takes ten times as long
        return {}
    return {
        f"{path}.{name}": module.get_buffer(name)
        for path, module in model.named_modules()
        if isinstance(module, KeepsBuffers)
        for name in module.kept
    }


class TrainedCopy(nn.Module, SiteLayer):
    """A frozen module and a trained copy of one `part` of it per adapter, at `PATH.{prefix}_{part}.ADAPTER`; the first
    active adapter that has one is used.

    Args:
        prefix: of the method's parameter names; peft finds the copies by it.
    """

    part = ""
    tokenwise = True
    rowless = True

    def __init__(self, base: nn.Module, adapter_name: str, prefix: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self._copies = f"{prefix}_{self.part}"
        self.adapter_layer_names = (self._copies,)
        setattr(self, self._copies, nn.ModuleDict())

    @property
    def copies(self) -> nn.ModuleDict:
        """The copy of each adapter."""
        return getattr(self, self._copies)


def norm_at_edge(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)`, computed in the dtype of its weight and returned in that of `x`."""
    dtype = norm.weight.dtype
    return norm(x) if x.dtype == dtype else norm(x.to(dtype)).to(x.dtype)


class TrainedNorm(TrainedCopy, FusablePart):
    """A frozen norm and trained copies of it."""

    part = "norm"
    arithmetic = staticmethod(norm_at_edge)

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter, whose norm starts as the frozen one."""
        base = base_layer(self)
        with gathered(list(base.parameters())):
            norm = copy.deepcopy(base)
        if next(norm.parameters()).dtype != torch.float64:
            norm = norm.float()
        self.copies[adapter_name] = norm
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x`, computed in the copy's dtype and returned in that of `x`."""
        if not self._frozen():
            for name in self.active_adapters:
                if name in self.copies:
                    return self.arithmetic(self.copies[name], x)
        return self.base_layer(x)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the trained values in place of the frozen ones."""
        for name in self._start_merge(adapter_names)[:1]:
            trained = dict(self.copies[name].named_parameters())
            with torch.no_grad():
                for key, parameter in self.base_layer.named_parameters():
                    parameter.copy_(trained[key])
            self.merged_adapters.append(name)


class HeldBias(Fusable):
    """A trained copy of a frozen bias. A module of its own, so that DeepSpeed's hooks gather it where it is used.

    Args:
        frozen: the bias, whole (see `gathered`).
    """

    def __init__(self, frozen: nn.Parameter):
        super().__init__()
        dtype = full_dtype(frozen.dtype)
        self.bias = nn.Parameter(frozen.detach().to(dtype, copy=True))
        # Under ZeRO-3 the frozen bias may be away when it has to be taken off the output again.
        self.register_buffer("frozen", frozen.detach().clone(), persistent=False)

    def forward(self, out: Tensor) -> Tensor:
        """`out`, which holds the frozen bias, with the trained one in its place; shape and dtype stay."""
        return (out + (self.bias - self.frozen)).to(out.dtype)


class TrainedBias(TrainedCopy):
    """A frozen Linear, Conv1D or norm and trained copies of its bias, `PATH.{prefix}_bias.ADAPTER.bias`."""

    part = "bias"

    def update_layer(self, adapter_name: str, config: PeftConfig) -> None:
        """Add an adapter, whose bias starts as the frozen one."""
        bias = base_layer(self).bias
        with gathered([bias]):
            self.copies[adapter_name] = HeldBias(bias)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The output of the frozen module for `x`, with the trained bias in place of the frozen one."""
        frozen = self._frozen()
        out = self.base_layer(x, *args, **kwargs)
        if not frozen:
            for name in self.active_adapters:
                if name in self.copies:
                    return self.copies[name](out)
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the trained bias in place of the frozen one."""
        for name in self._start_merge(adapter_names, ("bias",))[:1]:
            with torch.no_grad():
                self.base_layer.bias.copy_(self.copies[name].bias)
            self.merged_adapters.append(name)
