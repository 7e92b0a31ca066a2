"""A BART of two layers with random weights and a tokenizer of a few words, and grid features to go with it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from mmpeft_ds import backbones, registry
from tests.helpers.models import tiny_towers

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = [*SPECIAL, *tiny_towers.WORDS, "yes", "no", "true", "false", "vqa", "gpa", "nlvr", "caption", ":", "?", "."]
WIDTH, FEATURES = 16, 12


def write_bart(folder: Path, scale: float = 0.3) -> str:
    """BART's own token ids: start and end 2, begin 0, pad 1; checkpoints' settings for summaries included."""
    generator = torch.Generator().manual_seed(3)
    config = BartConfig(
        vocab_size=len(WORDS), d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=48,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    model.generation_config.no_repeat_ngram_size = 3
    model.save_pretrained(folder)
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


def make(folder: Path, vision: str = "", **options):
    """The backbone entry over a BART in `folder`; with `vision`, a family of tiny_towers, it takes pixels."""
    entry = registry.load(backbones, "clip_bart", "backbone.name")
    where = folder / "bart"
    if not where.is_dir():
        write_bart(where)
    defaults = dict(text=str(where), feature_width=FEATURES, grid=2, order_tokens=9, max_images=5)
    if vision:
        if not (folder / vision).is_dir():
            tiny_towers.write_vision(folder / vision, vision)
        defaults |= dict(vision=str(folder / vision), image_size=8)
    return entry(entry.Options(**{**defaults, **options}), None)


def grid(seed: int, side: int = 3) -> torch.Tensor:
    return torch.randn(side * side, FEATURES, generator=torch.Generator().manual_seed(seed))
