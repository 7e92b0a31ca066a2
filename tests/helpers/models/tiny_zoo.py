"""A tiny model of every family that adapters attach to: width 16, two layers, no dropout, biases that are not zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from tests.helpers.models.tiny_stock import IDS, VOCAB, _with_biases, bert, gpt2

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# the second text is padded
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


@dataclass(frozen=True)
class Tiny:
    """How to build a model and call it.

    Attributes:
        build: a new model with the same weights at every call; `attention` chooses the implementation.
        inputs: keyword arguments of its forward.
        prompt: keyword arguments of `generate`; None: it writes nothing.
    """

    build: Callable[..., nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    prompt: Callable[[], dict[str, Tensor]] | None = None


def pixels() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def _text() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK}


def _image() -> dict[str, Tensor]:
    return {"pixel_values": pixels()}


def _seq2seq() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": IDS.flip(1)}


def _caption() -> dict[str, Tensor]:
    return {**_image(), **_text()}


def _left_padded() -> dict[str, Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK.flip(1)}


def _caption_prompt() -> dict[str, Tensor]:
    return {**_image(), "input_ids": IDS[:, :2], "attention_mask": torch.ones_like(IDS[:, :2])}


def _make(cls: type, config: Callable[[], object]) -> Callable[..., nn.Module]:
    def build(attention: str | None = None) -> nn.Module:
        torch.manual_seed(0)
        made = config()
        if attention:
            made._attn_implementation = attention
        model = cls(made)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.dim() > 1):
                parameter.mul_(4.0)  # fresh weights of 0.02 would hide most differences
        return _with_biases(model.eval())

    return build


def _stock(builder: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    def build(attention: str | None = None) -> nn.Module:
        model = builder()
        if attention:
            model.set_attn_implementation(attention)
        return model

    return build


def _blip() -> BlipConfig:
    text = {**SIZES, "vocab_size": VOCAB, "encoder_hidden_size": 16, "max_position_embeddings": 32, "is_decoder": True}
    text |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "sep_token_id": 1, **SPECIAL}
    vision = {**SIZES, "image_size": 8, "patch_size": 4, "initializer_range": 0.02}  # the default is 1e-10
    return BlipConfig(text_config=text, vision_config=vision, projection_dim=16)


def _bart() -> BartConfig:
    half = {
        f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 2))
    }
    ffn = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    names = {**SPECIAL, "pad_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    return BartConfig(d_model=16, vocab_size=VOCAB, dropout=0.0, **half, **ffn, **names)


def _t5() -> T5Config:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB}
    return T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)


def _decoder(config: type) -> Callable[[], object]:
    kv = {"num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 32}
    return lambda: config(**SIZES, **kv, **SPECIAL)


def _vision(config: type, **options: object) -> Callable[[], object]:
    return lambda: config(**{**SIZES, "image_size": 8, "patch_size": 4, **options})


def _clip_text() -> CLIPTextConfig:
    return CLIPTextConfig(**SIZES, vocab_size=VOCAB, max_position_embeddings=16, eos_token_id=22, bos_token_id=0)


def _bert_decoder() -> BertConfig:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**SIZES, **quiet, vocab_size=VOCAB, is_decoder=True, add_cross_attention=True, **SPECIAL)


def _with_states() -> dict[str, Tensor]:
    states = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(4))
    return {
        **_text(),
        "encoder_hidden_states": states,
        "encoder_attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }


ZOO: dict[str, Tiny] = {
    "bert": Tiny(_stock(bert), _text),
    "roberta": Tiny(_stock(lambda: bert(roberta=True)), _text),
    "bert_decoder": Tiny(_make(BertLMHeadModel, _bert_decoder), _with_states),
    "gpt2": Tiny(_stock(gpt2), _text, _left_padded),
    "vit": Tiny(_make(ViTModel, _vision(ViTConfig)), _image),
    "dinov2": Tiny(_make(Dinov2Model, _vision(Dinov2Config, mlp_ratio=2)), _image),
    "clip_vision": Tiny(_make(CLIPVisionModel, _vision(CLIPVisionConfig)), _image),
    "clip_text": Tiny(_make(CLIPTextModel, _clip_text), _text),
    "siglip_vision": Tiny(_make(SiglipVisionModel, _vision(SiglipVisionConfig)), _image),
    "blip": Tiny(_make(BlipForConditionalGeneration, _blip), _caption, _caption_prompt),
    "bart": Tiny(_make(BartForConditionalGeneration, _bart), _seq2seq, _text),
    "t5": Tiny(_make(T5ForConditionalGeneration, _t5), _seq2seq, _text),
    "llama": Tiny(_make(LlamaForCausalLM, _decoder(LlamaConfig)), _text, _left_padded),
    "qwen2": Tiny(_make(Qwen2ForCausalLM, _decoder(Qwen2Config)), _text, _left_padded),
}


def output(model: nn.Module, tiny: Tiny, **more: object) -> Tensor:
    """Logits, or the last hidden states."""
    out = model(**{**tiny.inputs(), **more})
    return out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
