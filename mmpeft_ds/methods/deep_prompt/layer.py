"""Layers of deep prompts. They wrap leaves and hook the attention module or layer around them."""

# B batch, N tokens, P prompt tokens of all active adapters, w width of a projection, d model width

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from mmpeft_ds.distributed.partitioned import lent
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.calls import Call, parameters
from mmpeft_ds.methods.common.fused import Fusable
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.products import Multiplies
from mmpeft_ds.methods.deep_prompt.call import PrefixedCache, causal_mask, longer_mask
from mmpeft_ds.methods.deep_prompt.config import DeepPromptConfig
from mmpeft_ds.ops.precision import full_dtype


class Reparameterization(Fusable, nn.Sequential):
    """The perceptron of prompts."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(P, inner) -> (P, width)."""
        first, activation, last = self
        return last(activation(first(tokens)))


class Prompts(nn.Module, Multiplies):
    """P trained rows of a width, or what a perceptron makes of P trained vectors.

    Args:
        like: a frozen parameter, whose device is taken, and whose dtype if it is float64; else float32.
    """

    def __init__(self, width: int, config: DeepPromptConfig, like: Tensor):
        super().__init__()
        where = {"dtype": full_dtype(like.dtype), "device": like.device}
        inner, self.length = config.reparameterize, config.length
        self.tokens = nn.Parameter(torch.empty(config.length, inner or width, **where))
        with torch.no_grad():
            self.tokens.normal_(0, config.init_std)
        self.make = (
            Reparameterization(nn.Linear(inner, inner, **where), nn.Tanh(), nn.Linear(inner, width, **where))
            if inner
            else nn.Identity()
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self) -> Tensor:
        """(P, width)."""
        with self.multiplying(self.tokens):
            return self.dropout(self.make(self.tokens))


class PromptLayer(nn.Module, SiteLayer):
    """A leaf that holds prompts, or borrows those that another layer holds; it passes through what the leaf gives,
    unless `rows` says that the first rows of its input are places for prompts.

    Attributes:
        plans: of each adapter, which `Prompts` stands for which part ("key", "value" or "token").
        parts: (first output feature, width) of each part.
        hooked: the attention module or layer that it belongs to.
    """

    tokenwise = True  # tokens before a layer change its length, which a backbone sees
    adapter_layer_names = ("deep_prompt",)
    other_param_names = ("plans",)

    def __init__(self, base: nn.Module, adapter_name: str, parts: dict[str, tuple[int, int]], hooked: Hooked):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.deep_prompt = nn.ModuleDict()
        self.plans: dict[str, dict[str, Prompts]] = {}
        self.parts = parts
        self.hooked = hooked
        hooked.layers |= dict.fromkeys(parts, self)

    def update_layer(
        self, adapter_name: str, config: PeftConfig, like: Tensor, borrowed: dict[tuple[str, int], Prompts]
    ) -> None:
        """Add an adapter.

        Args:
            borrowed: prompts that other layers hold already, by part and width; this layer adds those that it makes.
        """
        own, plan = nn.ModuleDict(), {}
        for part, (_, width) in self.parts.items():
            if (part, width) not in borrowed:
                own[part] = borrowed[part, width] = Prompts(width, config, like)
            plan[part] = borrowed[part, width]
        if len(own):
            self.deep_prompt[adapter_name] = own
        self.plans[adapter_name] = plan
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active(self) -> list[str]:
        """Active adapters that have prompts here; none when disabled."""
        return [] if self._disable_adapters else [n for n in self.active_adapters if n in self.plans]

    def length(self, part: str) -> int:
        """P, also where ZeRO-3 has taken the prompts away."""
        return sum(self.plans[name][part].length for name in self.active())

    def prompts(self, part: str, adapters: list[str] | None = None) -> Tensor:
        """(P, width) of the given adapters, default the active ones."""
        parts = []
        for name in self.active() if adapters is None else adapters:
            prompts = self.plans[name][part]
            if name not in self.deep_prompt:
                lent(self, list(prompts.parameters()))
            parts.append(prompts())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        out = self.base_layer(x, *args, **kwargs)
        return self._placed(out) if self.hooked.rows and self.active() else out

    def _placed(self, out: Tensor) -> Tensor:
        """`out` with prompts in its first P rows, in the parts that have some."""
        columns, at = [], 0
        for part, (start, width) in sorted(self.parts.items(), key=lambda item: item[1]):
            prompts = self.prompts(part).to(out.dtype).expand(len(out), -1, -1)
            columns += [out[:, : prompts.shape[1], at:start], prompts]
            at = start + width
        first = torch.cat([*columns, out[:, : columns[1].shape[1], at:]], 2)
        return torch.cat([first, out[:, first.shape[1] :]], 1)

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: Any) -> nn.Module:
        """The frozen leaf; the hooks go with the first layer that is unloaded."""
        self.hooked.remove()
        return self.base_layer


@dataclass(eq=False)
class Hooked:
    """Hooks on a module of the frozen model; no module itself, so nothing of it is saved or counted.

    Attributes:
        path: of the module, for error messages.
        rows: inner leaves see places for prompts before their own tokens.
        layers: the layer that holds the prompts of each part.
    """

    path: str
    rows: bool = False
    layers: dict[str, PromptLayer] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list, repr=False)

    def attach(self, module: nn.Module) -> Hooked:
        """Register the hooks; returns itself."""
        self._handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            # Before hooks that are there already: that of transformers for `output_hidden_states` stays for good.
            module.register_forward_hook(self.after, prepend=True),
        ]
        return self

    def remove(self) -> None:
        """Leave the module as it was."""
        while self._handles:
            self._handles.pop().remove()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook."""
        raise NotImplementedError

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Forward hook."""
        return None


class PrefixedSelfAttention(Hooked):
    """Self-attention that takes a cache: it gets one whose keys and values have the prefix before them.

    So neither positions nor the real cache know of the prefix, and any attention implementation works.
    """

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.layers["key"].active():
            return None
        key, value = self.layers["key"].prompts("key"), self.layers["value"].prompts("value")
        call = Call(module, args, kwargs)
        given = call.get("past_key_values")
        real = getattr(given, "self_attention_cache", given)
        call.set("past_key_values", PrefixedCache(real, key, value))
        mask = longer_mask(call.get("attention_mask"), len(key), self.path)
        if mask is None:
            mask = self._without_mask(module, call, real, len(key))
        call.set("attention_mask", mask)
        return call.result()

    def _without_mask(self, module: nn.Module, call: Call, real: Any, prompts: int) -> Tensor | None:
        """sdpa that is causal without a mask would count the prefix as the first tokens of the text."""
        x = call.get("hidden_states")
        asked = call.get("is_causal")
        causal = getattr(module, "is_causal", True) if asked is None else asked
        if module.config._attn_implementation != "sdpa" or not causal or x.shape[1] == 1:
            return None
        past, keys = 0, x.shape[1]
        if real is not None:
            past, (keys, _) = real.get_seq_length(module.layer_idx), real.get_mask_sizes(keys, module.layer_idx)
        return causal_mask(x.shape[1], int(keys), int(past), prompts, x.device)


@dataclass(eq=False)
class PrefixedRows(Hooked):
    """Attention without a cache, and cross-attention: places for the prefix stand before the tokens (of the encoder,
    in cross-attention), and the projections of keys and values fill them.

    Attributes:
        source: name of the argument whose tokens become keys and values.
        mask: name of the argument with their mask.
    """

    source: str = "hidden_states"
    mask: str = "attention_mask"

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        length = self.layers["key"].length("key")
        if not length:
            return None
        call = Call(module, args, kwargs)
        x = call.get(self.source)
        call.set(self.source, torch.cat([x.new_zeros(1).expand(len(x), length, x.shape[2]), x], 1))
        if self.mask in parameters(type(module)):
            rows = x.shape[1] if self.source == "hidden_states" else None
            call.set(self.mask, longer_mask(call.get(self.mask), length, self.path, rows))
        return call.result()

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        length = self.layers["key"].length("key")
        return _cut(out, length) if length and self.source == "hidden_states" else None


@dataclass(frozen=True)
class Passage:
    """Places where the tokens of an adapter enter and leave: deep ones in each layer, shallow ones once."""

    enter: bool = True
    leave: bool = True
    deep: bool = True


@dataclass(eq=False)
class PromptedBlock(Hooked):
    """A transformer layer with tokens before its own; deep ones stand foremost, and are cut off its output.

    Attributes:
        passages: of each adapter that concerns this layer, also where its tokens only pass.
    """

    passages: dict[str, Passage] = field(default_factory=dict)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passing = self._passing()
        if not passing:
            return None
        call = Call(module, args, kwargs)
        hidden, present = call.get("hidden_states"), 0
        own = hidden.shape[1]
        for name, passage in passing:
            length = self.layers["token"].plans[name]["token"].length
            present += length
            if passage.enter:
                tokens = self.layers["token"].prompts("token", [name]).to(hidden.dtype)
                hidden = torch.cat([tokens.expand(len(hidden), -1, -1), hidden], 1)
            else:
                own -= length
        call.set("hidden_states", hidden)
        names = parameters(type(module))
        if "attention_mask" in names:
            mask = call.get("attention_mask")
            call.set("attention_mask", longer_mask(mask, present, self.path, own))
        mask = call.get("encoder_attention_mask")
        if mask is not None and mask.dim() > 2 and mask.shape[-2] == own > 1:
            seen = mask.dtype == torch.bool
            call.set("encoder_attention_mask", nn.functional.pad(mask, (0, 0, present, 0), value=seen))
        return call.result()

    def after(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        plans = self.layers["token"].plans
        length = sum(plans[name]["token"].length for name, passage in self._passing() if passage.leave)
        return _cut(out, length) if length else None

    def _passing(self) -> list[tuple[str, Passage]]:
        """Active adapters; shallow ones first, so that the tokens of deep ones come to stand before theirs."""
        holder = self.layers["token"]
        passing = [(name, self.passages[name]) for name in holder.active() if name in self.passages]
        if sum(not passage.deep for _, passage in passing) > 1:
            raise BadInput(f"{self.path}: two active adapters carry tokens through it. Activate one, or depth: deep.")
        return sorted(passing, key=lambda item: item[1].deep)


def _cut(out: Any, length: int) -> Any:
    """A module's output, or the first of its outputs, without its first `length` tokens."""
    return (out[0][:, length:], *out[1:]) if isinstance(out, tuple) else out[:, length:]
