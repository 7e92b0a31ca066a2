"""See what an attention module computes - queries, keys, values, mask - without wrapping or copying it.

For the time of one forward of that module an `Observation` is open: hooks on its projections and, where the family
calls transformers' attention registry, a registered function that hands its arguments over before it calls the one
that the model was configured for. Afterwards nothing is left behind, whether the forward returned, raised or was cut
short by activation checkpointing.
"""

# B batch, N query tokens, M key tokens, H heads, K key heads (fewer under grouped queries), d width of a head

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import AttentionSite, Projection

REGISTERED_AS = "mmpeft_ds_observed"
IMPLEMENTATIONS = ("sdpa", "eager")
# They do call the registry, but with a bias beside the mask, or once for each segment of one long sequence.
NOT_OBSERVABLE = {
    "T5Attention": "its position bias is no mask",
    "MT5Attention": "its position bias is no mask",
    "VisionAttention": "the patches of all images are one sequence",
    "Qwen2_5_VLVisionAttention": "the patches of all images are one sequence",
}


@dataclass
class Observation:
    """One forward of one attention module. Tensors keep their graph; they live as long as the forward.

    Attributes:
        q: (B, N, H d) output of the query projection, before any rotary embedding, where it is asked for.
        query, key, value: heads as the scores see them, (B, H, N, d), (B, K, M, d) and (B, K, M, d), with the past.
        mask: broadcastable to (B, H, N, M): bool with True = attend, or a term added to the scores.
        causal: a query sees no later keys, and `mask` does not say so.
        scaling: factor on the scores.
        probabilities: (B, H, N, M) after masks and before dropout, where the module hands them out; then `query` and
            `key` may be missing.
        project: the output projection, (B, n, H d) -> (B, n, width).
    """

    q: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None
    causal: bool = False
    scaling: float | None = None
    probabilities: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def values(self) -> Tensor:
        """(B, M, H d) value projections with heads side by side; a head that serves several queries is repeated."""
        return self.repeated(self.value).transpose(1, 2).flatten(2)

    @property
    def past(self) -> int:
        """Number of keys before those of this forward's own tokens (self-attention with a cache)."""
        return self.value.shape[2] - self.q.shape[1]

    def repeated(self, heads: Tensor) -> Tensor:
        """(B, K, M, d) -> (B, H, M, d)."""
        times = (self.probabilities if self.query is None else self.query).shape[1] // heads.shape[1]
        return heads if times == 1 else heads.repeat_interleave(times, 1)

    def close(self) -> None:
        """Take everything back that was put in for this forward."""
        while self._undo:
            self._undo.pop()()


_open: contextvars.ContextVar[tuple[tuple[object, Any], ...]] = contextvars.ContextVar("mmpeft_ds_open", default=())


def opened(owner: object) -> Any | None:
    """The observation that `owner` has open in the current forward, or None."""
    return next((what for who, what in reversed(_open.get()) if who is owner), None)


def open_for(owner: object, what: Any) -> None:
    """Keep `what` for `owner` until `close_for`."""
    _open.set((*_open.get(), (owner, what)))


def close_for(owner: object) -> None:
    """Close and forget what `owner` opened last; nothing if it has nothing open."""
    entries = _open.get()
    for at in reversed(range(len(entries))):
        if entries[at][0] is owner:
            _open.set(entries[:at] + entries[at + 1 :])
            entries[at][1].close()
            return


@contextlib.contextmanager
def observing(owner: object, what: Any) -> Iterator[Any]:
    """Run `owner` under what the caller has filled, such as an `Observation`."""
    open_for(owner, what)
    try:
        yield what
    finally:
        close_for(owner)


def check_observable(attention: nn.Module, site: AttentionSite) -> None:
    """Refuse attention modules that cannot be observed.

    Raises:
        BadInput: the family, or its attention implementation, cannot be observed.
    """
    core = _core(attention, site)
    if _observer(core, site) is _observe_registry:
        _implementation(core, site)


def observe(attention: nn.Module, site: AttentionSite, with_q: bool = True) -> Observation:
    """Open an observation of the forward of `attention` that is about to run; `close` it afterwards.

    Args:
        attention: the module at `site.path`.
        with_q: whether `q` is asked for.

    Raises:
        BadInput: the family, or its attention implementation, cannot be observed.
    """
    core = _core(attention, site)
    observer = _observer(core, site)
    with_q = with_q and observer is not _observe_returned  # which looks at them anyway
    seen = Observation(project=attention.get_submodule(_below(site, site.out.path)))
    try:
        observer(seen, core, attention, site)
        if with_q:
            _capture(seen, attention, site, site.q, lambda q: setattr(seen, "q", q))
    except BaseException:
        seen.close()
        raise
    return seen


def _below(site: AttentionSite, path: str) -> str:
    return path[len(site.path) + 1 :]


def _core(attention: nn.Module, site: AttentionSite) -> nn.Module:
    """The module that computes the scores: the one that holds the query projection."""
    return attention.get_submodule(_below(site, site.q.path).rpartition(".")[0])


def _observer(core: nn.Module, site: AttentionSite) -> Callable[..., None]:
    observer, why = _observer_of(type(core))
    if observer is None or (observer is _observe_registry and not hasattr(core, "config")):
        raise BadInput(f"{site.path}: attention of {why}.")
    return observer


@functools.cache
def _observer_of(kind: type) -> tuple[Callable[..., None] | None, str]:
    """The function that observes a class of attention, or None; and the reason to give where it is None."""
    names = [c.__name__ for c in kind.__mro__]
    none = f"class {names[0]} cannot be observed: it calls no attention registry"
    for name in names:
        if name in NOT_OBSERVABLE:
            return None, f"{name} cannot be observed: {NOT_OBSERVABLE[name]}"
    if "BlipTextSelfAttention" in names:
        return _observe_returned, none
    if "BlipAttention" in names:
        return _observe_fused, none
    return (None if _modeling(kind) is None else _observe_registry), none


@functools.cache
def _modeling(kind: type) -> ModuleType | None:
    """The transformers file that defines a class of modules, if it calls the attention registry."""
    for cls in kind.__mro__:
        module = sys.modules.get(cls.__module__)
        if hasattr(module, "ALL_ATTENTION_FUNCTIONS") and hasattr(module, "eager_attention_forward"):
            return module
    return None


def _capture(seen: Observation, attention: nn.Module, site: AttentionSite, part: Projection, take: Callable) -> None:
    """Hand the output of a projection to `take` for as long as the observation is open."""

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        take(out[..., part.start : part.start + part.width])

    leaf = attention.get_submodule(_below(site, part.path))
    seen._undo.append(leaf.register_forward_hook(hook).remove)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)  # `unflatten` asks more of the shape first


# ---------------------------------------------------------------------------- families on the attention registry


def _observe_registry(seen: Observation, core: nn.Module, attention: nn.Module, site: AttentionSite) -> None:
    """For this forward `core` sees a copy of its config that names our function."""
    registry = _modeling(type(core)).ALL_ATTENTION_FUNCTIONS
    implementation, config = _implementation(core, site), core.config
    if REGISTERED_AS not in registry:
        type(registry).register(REGISTERED_AS, _observed)
    # The public setter would reach into configs that the copy shares, and copy.copy takes ten times as long.
    marked = object.__new__(type(config))
    vars(marked).update(vars(config), _attn_implementation_internal=REGISTERED_AS, _observed_by=(seen, implementation))
    held = vars(core)  # an attribute like any other, for which a module's own way takes ten times as long
    held["config"] = marked
    seen._undo.append(lambda: held.update(config=config))


def _implementation(core: nn.Module, site: AttentionSite) -> str:
    """The attention function that `core` is configured for. Raises BadInput if it cannot be observed."""
    name = core.config._attn_implementation or "eager"
    if name not in IMPLEMENTATIONS:
        raise BadInput(
            f"{site.path}: attention implementation {name!r} cannot be observed. Use {' or '.join(IMPLEMENTATIONS)} "
            "(engine.attention in a recipe, attn_implementation of from_pretrained)."
        )
    if name == "eager" and getattr(core, "reorder_and_upcast_attn", False):
        raise BadInput(f"{site.path}: reorder_and_upcast_attn keeps its attention to itself. Use sdpa.")
    return name


def _observed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: notes its arguments and calls the configured one."""
    seen, implementation = module.config._observed_by
    sdpa = implementation == "sdpa"
    seen.query, seen.key, seen.value, seen.mask = query, key, value, attention_mask
    seen.scaling = kwargs.get("scaling")
    rows = query.shape[2]
    if sdpa and attention_mask is None and rows > 1:
        # sdpa without a mask asks the caller, then the module, whether it is causal; without either it is.
        causal = kwargs.get("is_causal")
        seen.causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
        seen.mask = attention_mask[..., : key.shape[2]]
    modeling = _modeling(type(module))
    function = modeling.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, modeling.eager_attention_forward)
    return function(module, query, key, value, attention_mask, **kwargs)


# ----------------------------------------------------------------------------------------------------------- BLIP


def _observe_returned(seen: Observation, core: nn.Module, attention: nn.Module, site: AttentionSite) -> None:
    """BLIP text: the module returns its probabilities before dropout; keys and values may come from the cache."""
    seen.scaling = core.attention_head_size**-0.5
    fresh: dict[str, Tensor] = {}
    _capture(seen, attention, site, site.q, lambda q: setattr(seen, "q", q))
    _capture(seen, attention, site, site.k, lambda k: fresh.update(k=k))
    _capture(seen, attention, site, site.v, lambda v: fresh.update(v=v))

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: tuple[Tensor, Tensor]) -> None:
        seen.query, seen.probabilities = _heads(seen.q, site.heads), out[1]
        seen.mask = kwargs.get("encoder_attention_mask" if site.cross else "attention_mask")
        cache = kwargs.get("past_key_values")
        if cache is None:
            seen.key, seen.value = _heads(fresh["k"], site.heads), _heads(fresh["v"], site.heads)
        else:
            part = "cross_attention_cache" if site.cross else "self_attention_cache"
            cached = getattr(cache, part, cache).layers[module.layer_idx]
            seen.key, seen.value = cached.keys, cached.values

    seen._undo.append(core.register_forward_hook(hook, with_kwargs=True).remove)


def _observe_fused(seen: Observation, core: nn.Module, attention: nn.Module, site: AttentionSite) -> None:
    """BLIP vision: q, k and v side by side in one Linear, no mask; what it returns went through dropout."""
    seen.scaling = core.scale

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        for name, part in (("query", site.q), ("key", site.k), ("value", site.v)):
            setattr(seen, name, _heads(out[..., part.start : part.start + part.width], site.heads))

    leaf = attention.get_submodule(_below(site, site.q.path))
    seen._undo.append(leaf.register_forward_hook(hook).remove)
