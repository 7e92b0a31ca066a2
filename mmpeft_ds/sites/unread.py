"""Skipping positions of a language model's last layer that predict no label.

A layer computes the keys and values of all tokens, since later tokens attend to them. After the attention of the last
layer only the positions that predict a label are read, so the others are left out of its output projection and its
feed-forward block, which are most of a layer's arithmetic. Zeros stand in their place; norms and sums still run over
all positions, so no shape changes.
"""

# B rows, S positions of each, N positions that are read, d width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.sites.base import AdapterLayer, Sites
from mmpeft_ds.sites.find import find_sites

MOST = 0.9  # share of positions that are read above which leaving out the others is not worth copying


class LastLayer:
    """The last layer of the language model in `base`, adapters in place.

    Attributes:
        base: the model.
        parts: modules after its attention that hold all their arithmetic on single tokens; none where the model ends
            in a layer that cannot be read, or in which something else mixes tokens.
    """

    def __init__(self, base: nn.Module):
        self.base = base
        self.parts: list[nn.Module] = []
        self._adapters: list[nn.Module] = []
        self._around: list[nn.Module] = []  # which may say that the layer is computed again in the backward pass
        sites = find_sites(base)
        causal = [site for site in sites.attention if site.causal and site.modality == "text"]
        if causal:
            self._read(base, sites, causal[-1].block)

    def _read(self, base: nn.Module, sites: Sites, path: str) -> None:
        modules = dict(base.named_modules())
        parent, _, index = path.rpartition(".")
        stack = modules.get(parent)
        if not isinstance(stack, nn.ModuleList) or modules[path] is not stack[-1]:
            return
        attention = [site for site in sites.attention if site.block == path]
        names = [attention[-1].out.path]
        for site in sites.ffn:
            if site.block == path:
                names += [site.path] if site.path != path else [site.up.path, site.down.path]
        known = {name.removeprefix(f"{path}.").partition(".")[0] for name in [*names, *(s.path for s in attention)]}
        others = [child for name, child in modules[path].named_children() if name not in known]
        if any(list(child.children()) or isinstance(child, _MIXING) for child in others):
            return
        self.parts = [modules[name] for name in names]
        self._adapters = [module for module in modules[parent].modules() if hasattr(module, "base_layer")]
        words = path.split(".")
        self._around = [modules[".".join(words[:n])] for n in range(len(words) + 1)]

    def may_leave_out(self) -> bool:
        """Whether it can be done in a forward pass that begins now."""
        if not self.parts or not torch.is_grad_enabled():
            return False  # an evaluated model gives bit for bit what its adapter gives with peft alone
        # Recomputed in the backward pass, the layer would not know what was left out.
        again = any(m.training and getattr(m, "gradient_checkpointing", False) for m in self._around)
        whole = any("forward" in vars(part) or part._compiled_call_impl is not None for part in self.parts)
        return not again and not whole and all_allow(self._adapters, "rowless")

    @contextlib.contextmanager
    def reading(self, read: Callable[[int], Tensor | None]) -> Iterator[None]:
        """Context in which only positions that are read go through the parts.

        Args:
            read: for the number of positions S, the (N,) numbers of those that are read, of B * S; None: all.
        """
        if not self.may_leave_out():
            yield
            return
        for part in self.parts:
            vars(part)["forward"] = _OfRead(part.forward, read)  # `nn.Module` would look for a parameter of this name
        try:
            yield
        finally:
            for part in self.parts:
                del vars(part)["forward"]


# Modules without children of their own that mix tokens.
_MIXING = (nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)


class _OfRead:
    """Forward of a module that treats every position alone, for those that are read; zeros elsewhere."""

    def __init__(self, plain: Callable[..., Any], read: Callable[[int], Tensor | None]):
        self.plain, self.read = plain, read

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        at = self.read(x.shape[1]) if x.dim() == 3 and not args and not kwargs else None
        if at is None:
            return self.plain(x, *args, **kwargs)
        rows = self.plain(x.flatten(0, 1).index_select(0, at)[None])
        return put_back(rows, at, *x.shape[:2])


def put_back(found: Tensor, at: Tensor, rows: int, length: int) -> Tensor:
    """(rows, length, d) with `found` (1, N, d) at the places `at` (N,), zeros elsewhere."""
    whole = found.new_zeros(rows * length, found.shape[-1])
    # `at` has no position twice; index_copy_ would be the same, at twice the time on a CPU
    return whole.index_add_(0, at, found[0]).view(rows, length, -1)


# The layers of peft itself are maps of single tokens, but for Lily's, which weighs its factors by all tokens it sees.
_MIXING_OF_PEFT = ("peft.tuners.lily.",)


def all_allow(modules: Iterable[nn.Module], name: str) -> bool:
    """Whether all adapters among `modules` that are at work have the property `tokenwise` or `rowless`; layers of peft
    itself have both if they do not mix tokens."""
    for module in modules:
        if getattr(module, name, None) is True:
            continue
        if hasattr(module, "base_layer") and not getattr(module, "disable_adapters", False):
            place = type(module).__module__
            of_peft = place.startswith("peft.") and not place.startswith(_MIXING_OF_PEFT)
            if not (getattr(module, name) if isinstance(module, AdapterLayer) else of_peft):
                return False
    return True
