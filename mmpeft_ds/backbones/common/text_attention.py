"""Attention of texts that stand in one row, each by itself.

A mask that separates texts has as many entries as the square of the row, and sdpa computes them all, those between two
texts too. Each text by itself needs no mask, so that sdpa takes its causal kernel: of a row of 4,096 tokens in five
texts a tenth of the entries are left. Where a model needs a mask, each text takes its part of it. Two names are
registered with transformers, so that layers pass the lengths of the texts on, also where a block is computed again in
the backward pass: with the first it makes no mask of a row of texts, with the second as for its own sdpa.
"""

# H heads, N tokens of all texts, d width of a head

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from mmpeft_ds.sites.condition import current

NAME = "sdpa_by_text"
MASKED = "sdpa_by_text_masked"
NAMES = (NAME, MASKED)
LENGTHS = "text_lengths"  # argument of the model's forward that reaches every attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    text_lengths: tuple[int, ...] = (),
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa for each text of a row; with no `text_lengths`, for the rows as they are.

    Args:
        query, key, value: (1, H, N, d), or (B, H, S, d) for rows as they are.
        attention_mask: None where a text is causal; else (1, 1 or H, N, N), what a token sees of its own text.
        text_lengths: tokens of each text, N together.

    Raises:
        ValueError: the row has another number of tokens.
    """
    if not text_lengths:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.shape[2] != sum(text_lengths):
        raise ValueError(f"texts of {sum(text_lengths)} tokens in a row of {query.shape[2]}")
    window = kwargs.get("sliding_window")  # which sdpa knows by its mask alone
    outputs, first = [], 0
    for text in zip(*(part.split(text_lengths, dim=2) for part in (query, key, value)), strict=True):
        own, first = slice(first, first + text[0].shape[2]), first + text[0].shape[2]
        if attention_mask is not None:
            seen = attention_mask[..., own, own]
        else:
            seen = _window_mask(text[0], window) if window and text[0].shape[2] > window else None
        outputs.append(sdpa_attention_forward(module, *text, seen, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _window_mask(query: Tensor, window: int) -> Tensor:
    """(1, 1, N, N) bool: a token sees itself and the `window` - 1 before it."""
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    return (seen.tril() & seen.triu(1 - window))[None, None]


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None for a row of texts; else what sdpa gets."""
    condition = current()
    return None if condition is not None and condition.segments is not None else sdpa_mask(*args, **kwargs)


def of_parts(name: str, config: PretrainedConfig) -> dict[str, str] | str:
    """`attn_implementation` of a model: `name`, and sdpa in those towers that have no form for it, as many have none
    for flash-attn, and some look up their classes by the usual names."""
    if name not in NAMES and "flash" not in name:
        return name
    text = config.get_text_config()
    whole = name not in NAMES and takes_flash(config)
    parts = {}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        usable = part is text or (name not in NAMES and takes_flash(part))
        parts[key] = name if usable else "sdpa"
    parts[""] = name if whole else "sdpa"
    # where no part is the language model, it cannot have another name than the rest
    return parts if len(set(parts.values())) > 1 else name


def takes_flash(config: PretrainedConfig | None) -> bool:
    """Whether transformers' model of a configuration has a form for flash-attn; True where it has no model."""
    known = None if config is None else MODEL_MAPPING.get(type(config), None)
    if known is not None:
        return all(c._supports_flash_attn for c in (known if isinstance(known, tuple) else [known]))
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    if ".modeling_" not in module or importlib.util.find_spec(module) is None:
        return True
    classes = [c for c in vars(importlib.import_module(module)).values() if inspect.isclass(c)]
    own = [c for c in classes if issubclass(c, PreTrainedModel) and c.config_class is type(config)]
    return all(model_class._supports_flash_attn for model_class in own)


for _name, _mask in ((NAME, mask), (MASKED, sdpa_mask)):
    AttentionInterface.register(_name, attention)
    AttentionMaskInterface.register(_name, _mask)
