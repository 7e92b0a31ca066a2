"""BLIP checkpoints of every form with random weights and a tokenizer of a dozen words, as transformers folders."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    PreTrainedTokenizerFast,
)

from tests.helpers.models.randomise import randomise

WIDTH = 16
WORDS = ["is", "there", "a", "red", "blue", "round", "big", "circle", "square", "what", "color", "it", "?", "the"]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
DEC = len(VOCABULARY)
ENC = DEC + 1
CLASSES = {
    "captioner": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
}
LAYERS = dict(hidden_size=WIDTH, num_attention_heads=2, intermediate_size=4 * WIDTH)
IDS = dict(pad_token_id=0, sep_token_id=2, eos_token_id=2, bos_token_id=DEC)


def config(layers: int = 2, **text) -> BlipConfig:
    text = dict(
        vocab_size=ENC + 1, num_hidden_layers=layers, max_position_embeddings=40, encoder_hidden_size=WIDTH, **LAYERS,
        **IDS, **text,
    )  # fmt: skip
    vision = dict(image_size=8, patch_size=4, num_hidden_layers=layers, **LAYERS)
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=6)


def write(folder: Path, form: str, **options) -> str:
    """A checkpoint of that form for images of 8x8 in patches of 4x4; options as of `config`."""
    model = CLASSES[form](config(**options))
    randomise(model, seed=1)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)
