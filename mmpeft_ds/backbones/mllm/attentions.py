"""The attention implementations that compute what a checkpoint of a family means."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_ds.backbones.common.text_attention import takes_flash
from mmpeft_ds.backbones.mllm.families.base import Family

_WIDEST = 256  # head that flash-attn takes


def possible(config: PretrainedConfig, family: Family, stock_class: type[PreTrainedModel] | None) -> tuple[str, ...]:
    """As `BackboneBase.attentions`: without flash-attn where the language model has no form for it, where its heads
    are too wide for it, or where texts look ahead, which transformers leaves out with it without a word."""
    if not getattr(stock_class, "_supports_sdpa", True):
        return ("eager",)
    text = config.get_text_config()
    layers = [text.to_dict(), *(text.to_dict().get("per_layer_config") or {}).values()]
    widest = max(layer.get(name) or 0 for layer in layers for name in ("head_dim", "global_head_dim"))
    return () if takes_flash(text) and widest <= _WIDEST and not family.looks_ahead(config) else ("sdpa", "eager")
