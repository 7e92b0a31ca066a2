"""Entry of representation tokens into the encoders: the shared space, its aligners, and hooks on layers of a tower."""

# B rows, N tokens of a row, K representation tokens, r width of the space, d width of a tower

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.calls import Call
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.ops.precision import at_least_float32, full_dtype
from mmpeft_ds.ops.representation_tokens import insert_tokens, mask_of_inserted, take_tokens
from mmpeft_ds.sites.feature_site import collected

REPRESENTATION = "representation"  # what the image tower gives beside its feature: see `collecting`

_of_classes: contextvars.ContextVar[str | None] = contextvars.ContextVar("mmpeft_ds_mmrl", default=None)


@contextlib.contextmanager
def reading_classes(adapter: str) -> Iterator[None]:
    """Texts that go through the text tower in here are those of classes, and get the tokens of this adapter."""
    token = _of_classes.set(adapter)
    try:
        yield
    finally:
        _of_classes.reset(token)


class Space(nn.Module):
    """The shared tokens of one adapter, `tokens` (K, r), from N(0, std^2)."""

    def __init__(self, count: int, width: int, std: float, like: Tensor):
        super().__init__()
        drawn = std * torch.randn(count, width, dtype=full_dtype(like.dtype))
        self.tokens = nn.Parameter(drawn.to(like.device))

    def forward(self) -> Tensor:
        """(K, r)."""
        return self.tokens.clone()  # under ZeRO-3 the parameter itself is released after this module


def aligners(layers: range, width: int, tower_width: int, like: Tensor) -> nn.ModuleDict:
    """A linear map r -> d for each layer, under its number. All start equal, as in the published code."""
    first = nn.Linear(width, tower_width, dtype=full_dtype(like.dtype)).to(like.device)
    return nn.ModuleDict({str(layer): copy.deepcopy(first) for layer in layers})


@dataclass(eq=False)
class Tower:
    """Hooks on the layers of one encoder. It is not a module, so nothing of it is saved or counted.

    Attributes:
        path: of the tower.
        blocks: path of each layer.
        causal: later tokens are masked.
        reads: `text` or `image`; of an image tower the states of the tokens are given on (`collecting`).
        norm: that states of the last layer go through on their way to a feature; None where they take none.
        tokens: layer -> (K, d) for the pass that runs, or ran last; empty in passes without tokens.
    """

    path: str
    blocks: list[str]
    causal: bool
    reads: str
    norm: nn.Module | None = None
    tokens: dict[int, Tensor] = field(default_factory=dict)
    _taken: Tensor | None = None
    _handles: list[Any] = field(default_factory=list, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # The model is copied between passes only; tensors with a graph cannot be copied.
        return {**vars(self), "tokens": {}, "_taken": None}

    def attach(self, model: nn.Module) -> Tower:
        """Register the hooks; returns itself."""
        whole = model.get_submodule(self.path)
        self._handles = [whole.register_forward_pre_hook(self._begin), whole.register_forward_hook(self._end)]
        for layer, path in enumerate(self.blocks):
            before = functools.partial(self._before, layer)
            self._handles.append(model.get_submodule(path).register_forward_pre_hook(before, with_kwargs=True))
        # Run before existing hooks: that of transformers for `output_hidden_states` is never removed.
        last = model.get_submodule(self.blocks[-1])
        self._handles.append(last.register_forward_hook(self._after, prepend=True))
        return self

    def remove(self) -> None:
        """Leave the tower as it was."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens, self._taken = {}, None

    def _before(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = self.tokens.get(layer)
        if tokens is None:
            return None
        call = Call(module, args, kwargs)
        present = len(self.tokens[layer - 1]) if layer - 1 in self.tokens else 0
        call.set("hidden_states", insert_tokens(call.get("hidden_states"), tokens, present))
        mask = call.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise BadInput(f"mmrl: tokens cannot enter a {type(mask).__name__}. Use engine.attention: sdpa.")
            call.set("attention_mask", mask_of_inserted(mask, len(tokens), self.causal))
        return call.result()

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if not self.tokens:
            return None
        hidden = out[0] if isinstance(out, tuple) else out
        own, taken = take_tokens(hidden, len(self.tokens[len(self.blocks) - 1]))
        if collected() is not None:
            self._taken = taken
        return (own, *out[1:]) if isinstance(out, tuple) else own

    def _end(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        images = collected() if self.reads == "image" else None
        if self._taken is not None and images is not None:
            states = self._taken if self.norm is None else self.norm(self._taken)
            images[REPRESENTATION] = at_least_float32(states).mean(1)
        self._taken = None  # the tokens stay: older releases of transformers recompute a layer with its hooks


class Entrance(nn.Module, SiteLayer):
    """Wraps the module that embeds the tokens, or patches, of a tower. Each pass begins here: representation tokens
    of all layers are computed by `PATH.mmrl_aligner.ADAPTER.LAYER`; the output is that of the frozen module.

    The aligners are outside of the layers, because ZeRO-3 gathers a layer as a whole.

    Attributes:
        tower: its hooks insert the tokens.
        spaces: adapter -> the space, which belongs to that adapter's head.
    """

    adapter_layer_names = ("mmrl_aligner",)
    other_param_names = ("spaces",)

    def __init__(self, base: nn.Module, adapter_name: str, tower: Tower):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.mmrl_aligner = nn.ModuleDict()
        self.spaces: dict[str, Space] = {}
        self.tower = tower

    def __getattr__(self, name: str) -> Any:
        # Towers look at the parts of the module that embeds patches, such as `projection`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the frozen module."""
        adapter = self._adapter()
        if adapter is not None:
            space = self.spaces[adapter]()
            self.tower.tokens = {int(n): aligner(space) for n, aligner in self.mmrl_aligner[adapter].items()}
        return self.base_layer(*args, **kwargs)

    def _adapter(self) -> str | None:
        """The adapter whose tokens enter in this pass, if any: class texts and images of the model's own forward."""
        if self._disable_adapters:
            return None
        if self.tower.reads == "text":
            return _of_classes.get()
        if collected() is None:
            return None
        return next((name for name in self.active_adapters if name in self.spaces), None)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The frozen module; the hooks go with it."""
        self.tower.remove()
        return self.base_layer
