"""One tiny model of every family that methods attach to, and how each is run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor, nn

IDS = torch.tensor([[5, 6, 7, 8, 9, 4], [9, 4, 5, 3, 2, 6]])
TEXT = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {key: TEXT[key] for key in list(TEXT)[1:]} | {"image_size": 8, "patch_size": 4}
MEMORY = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
QUIET = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert(**options: object) -> nn.Module:
    return tf.BertModel(tf.BertConfig(**TEXT, **options))


def bert_decoder(**options: object) -> nn.Module:
    return tf.BertLMHeadModel(tf.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True, **options))


def roberta(**options: object) -> nn.Module:
    return tf.RobertaModel(tf.RobertaConfig(**TEXT, **options))


def gpt2(**options: object) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 23}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **QUIET, add_cross_attention=True, **options))


def llama(**options: object) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=1, **QUIET, **options))


def qwen2(**options: object) -> nn.Module:
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT, num_key_value_heads=1, **QUIET, **options))


def bart(**options: object) -> nn.Module:
    sides = {f"{side}_{key}": 2 for side in ("encoder", "decoder") for key in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "vocab_size": 23}
    ids = QUIET | {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return tf.BartForConditionalGeneration(tf.BartConfig(**sides, **widths, **ids, **options))


def clip_text(**options: object) -> nn.Module:
    return tf.CLIPTextModel(tf.CLIPTextConfig(**TEXT, **QUIET, **options))


def clip_vision(**options: object) -> nn.Module:
    return tf.CLIPVisionModel(tf.CLIPVisionConfig(**IMAGE, **options))


def siglip_vision(**options: object) -> nn.Module:
    return tf.SiglipVisionModel(tf.SiglipVisionConfig(**IMAGE, **options))


def vit(**options: object) -> nn.Module:
    return tf.ViTModel(tf.ViTConfig(**IMAGE, **options))


def dinov2(**options: object) -> nn.Module:
    sizes = {key: IMAGE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=8, patch_size=4, **options))


def blip_text(**options: object) -> nn.Module:
    config = tf.BlipTextConfig(**TEXT, encoder_hidden_size=16, is_decoder=True, sep_token_id=2, **QUIET, **options)
    return tf.models.blip.modeling_blip_text.BlipTextLMHeadModel(config)


def blip_vision(**options: object) -> nn.Module:
    return tf.BlipVisionModel(tf.BlipVisionConfig(**IMAGE, **options))


def _ids(model: nn.Module, **more: object) -> object:
    return model(input_ids=IDS, **more)


def _with_memory(model: nn.Module, **more: object) -> object:
    return model(input_ids=IDS, encoder_hidden_states=MEMORY.to(_dtype(model)), **more)


def _sequences(model: nn.Module, **more: object) -> object:
    return model(input_ids=IDS, decoder_input_ids=IDS[:, 1:], **more)


def _pixels(model: nn.Module, **more: object) -> object:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return model(pixel_values=pixels.to(_dtype(model)), **more)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


FAMILIES: dict[str, tuple[Callable[..., nn.Module], Callable[..., object]]] = {
    "bert": (bert, _ids),
    "bert_decoder": (bert_decoder, _with_memory),
    "roberta": (roberta, _ids),
    "gpt2": (gpt2, _with_memory),
    "llama": (llama, _ids),
    "qwen2": (qwen2, _ids),
    "bart": (bart, _sequences),
    "clip_text": (clip_text, _ids),
    "clip_vision": (clip_vision, _pixels),
    "siglip_vision": (siglip_vision, _pixels),
    "vit": (vit, _pixels),
    "dinov2": (dinov2, _pixels),
    "blip_text": (blip_text, _with_memory),
    "blip_vision": (blip_vision, _pixels),
}


def build(name: str, seed: int = 0, **options: object) -> nn.Module:
    """A tiny model in eval mode whose biases and norms are not what they start as."""
    torch.manual_seed(seed)
    model = FAMILIES[name][0](**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def forward(name: str, model: nn.Module, **more: object) -> object:
    """The model's output object on fixed inputs."""
    return FAMILIES[name][1](model, **more)


def output(name: str, model: nn.Module, **more: object) -> Tensor:
    """Its first output."""
    return forward(name, model, **more)[0]
