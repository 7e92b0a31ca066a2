"""Bytes of keys and values that generation keeps in evaluation."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmpeft_ds.data.order import ceil
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.planning import microbatch
from mmpeft_ds.sites.base import base_model


def of(resolved: Resolved, model: nn.Module, filling: microbatch.Filling) -> int:
    """Bytes for one sample with one text; 0 where nothing is generated.

    Every beam keeps keys and values of the prompt, at the length that the recipe allows, of the images and videos in
    it, and of what it writes.
    """
    wanted = [s.task.generation for s in resolved.validation if s.task.generation is not None]
    if not wanted or not resolved.backbone.generates:
        return 0
    config = base_model(model).config.get_text_config(decoder=True)
    heads = _first(config, "num_key_value_heads", "num_attention_heads", "decoder_attention_heads", "n_head")
    all_heads = _first(config, "num_attention_heads", "decoder_attention_heads", "n_head")
    width = _first(config, "head_dim") or _first(config, "hidden_size", "d_model", "n_embd") // all_heads
    layers = _first(config, "decoder_layers", "num_hidden_layers", "n_layer")
    options = resolved.backbone.options
    prompt = getattr(options, resolved.backbone.prompt_limit, 0) or 0
    prompt += microbatch.media_tokens(resolved.backbone, filling)
    bytes_of_token = 2 * layers * heads * width * resolved.backbone.dtype.itemsize
    return (
        max(g.get("num_beams", 1) * (prompt + g.get("max_new_tokens", g.get("max_length", 0))) for g in wanted)
        * bytes_of_token
    )


def samples(resolved: Resolved, ranks: int) -> int:
    """Samples that a rank evaluates at a time, as `data.stream.Stream` hands them out."""
    data, source = resolved.recipe.data, resolved.validation[:1]
    coupled = resolved.method_options.couples_samples or any(s.task.couples_samples for s in source)
    return ceil(data.global_batch, ranks) if coupled else min(data.global_batch, data.evaluation_batch)


def _first(config: Any, *names: str) -> int:
    return next((value for name in names if (value := getattr(config, name, None))), 0)
