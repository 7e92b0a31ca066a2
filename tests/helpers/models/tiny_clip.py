"""A CLIP and a SigLIP with random weights and a tokenizer of a dozen words, written as transformers folders."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from tests.helpers.models.randomise import randomise

WIDTH, SHARED = 16, 16
WORDS = ["is", "there", "a", "red", "blue", "round", "big", "circle", "square", "what", "color", "it", "shape", "the"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS, "[EOS]"])}
LAYERS = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
TEXT = dict(vocab_size=len(VOCABULARY), hidden_size=WIDTH, max_position_embeddings=12, **LAYERS)
IDS = dict(pad_token_id=0, bos_token_id=VOCABULARY["[BOS]"], eos_token_id=VOCABULARY["[EOS]"])
VISION = dict(hidden_size=24, image_size=8, patch_size=4, **LAYERS)


def write(folder: Path, family: str, shared: int = SHARED) -> str:
    """A dual encoder of that `model_type` for images of 8x8, the shared space `shared` wide."""
    if family == "clip":
        text, vision = {**TEXT, **IDS, "projection_dim": shared}, {**VISION, "projection_dim": shared}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shared))
    else:
        vision = {**VISION, "hidden_size": shared}
        model = SiglipModel(SiglipConfig(text_config={**TEXT, **IDS, "projection_size": shared}, vision_config=vision))
    randomise(model, kept=("logit_scale", "logit_bias"))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [(name, VOCABULARY[name]) for name in ("[BOS]", "[EOS]")]
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=ends)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)
