"""Towers of every family with random weights, and tokenizers of a dozen words, written as transformers folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from tests.helpers.models.randomise import randomise

WIDTH = 16
WORDS = ["is", "there", "a", "red", "blue", "round", "big", "circle", "square", "what", "color", "it", "shape", "the"]
COMMON = dict(hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
VISION = {
    "vit": (ViTConfig, ViTModel, {}),
    "dinov2": (Dinov2Config, Dinov2Model, {"mlp_ratio": 2}),
    "clip": (CLIPVisionConfig, CLIPVisionModel, {}),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, {}),
}
DECODERS = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_inner": 24}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1}),
}


def write_vision(folder: Path, family: str, width: int = WIDTH) -> str:
    """A vision tower of 3 layers for images of 8x8 in patches of 4x4."""
    config, model, extra = VISION[family]
    return _save(folder, model(config(image_size=8, patch_size=4, **{**COMMON, "hidden_size": width}, **extra)))


def write_text(folder: Path, family: str, pooler: bool = True) -> str:
    """A text encoder of 3 layers and its tokenizer; RoBERTa's has pad id 1 as everywhere."""
    pad = 1 if family == "roberta" else 0
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] if pad else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    config, model = (RobertaConfig, RobertaModel) if family == "roberta" else (BertConfig, BertModel)
    sizes = dict(vocab_size=len(vocabulary), max_position_embeddings=40, type_vocab_size=1, pad_token_id=pad)
    _save(folder, model(config(**COMMON, **sizes, hidden_dropout_prob=0.1), add_pooling_layer=pooler))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def write_decoder(folder: Path, family: str = "gpt2", width: int = WIDTH) -> str:
    """A language model of 3 layers and its tokenizer, whose token 0 is "!" and whose text ends with the last one."""
    vocabulary = {word: i for i, word in enumerate(["!", "[UNK]", "<s>", *WORDS, "<|endoftext|>"])}
    end = len(vocabulary) - 1
    ids = dict(vocab_size=len(vocabulary), bos_token_id=end, eos_token_id=end, max_position_embeddings=40)
    config, model, extra = DECODERS[family]
    _save(folder, model(config(**{**COMMON, "hidden_size": width}, **ids, **extra)))
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = dict(unk_token="[UNK]", bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def _save(folder: Path, model: torch.nn.Module) -> str:
    randomise(model)
    model.save_pretrained(folder)
    return str(folder)
