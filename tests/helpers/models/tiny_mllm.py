"""Multimodal language models of every supported family with random weights, a few thousand each."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from mmpeft_ds.backbones.mllm import torchvision_functions
from tests.helpers.models.randomise import randomise

WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 48, 2
VOCABULARY = 64
# ids of the tokenizer that `tiny_mllm.write` saves with the model
IMAGE, VISION_START, VISION_END, VIDEO = 5, 6, 7, 9
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=INNER,
    max_position_embeddings=512,
)
CLIP = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
)
# M-RoPE splits half of a head of 8 in three
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
QWEN_IDS = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END
)
FILMS = dict(patch_size=2, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 512})
QWEN_PATCHES = dict(patch_size=2, temporal_patch_size=2, spatial_merge_size=2, num_heads=2, depth=3)


def llava() -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(**CLIP), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)


def llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=MistralConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )


def qwen2_vl() -> Qwen2VLConfig:
    vision = dict(**QWEN_PATCHES, embed_dim=16, hidden_size=WIDTH, mlp_ratio=2)
    return Qwen2VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **QWEN_IDS)


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = dict(
        **QWEN_PATCHES,
        hidden_size=16,
        out_hidden_size=WIDTH,
        intermediate_size=24,
        window_size=8,
        fullatt_block_indexes=[2],
    )
    return Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": ROPE}, vision_config=vision, **QWEN_IDS)


# family -> (configuration, stock class, text tower, image tower)
FAMILIES = {
    "llava": (llava, LlavaForConditionalGeneration, "model.language_model", "model.vision_tower"),
    "llava_next": (llava_next, LlavaNextForConditionalGeneration, "model.language_model", "model.vision_tower"),
    "qwen2_vl": (qwen2_vl, Qwen2VLForConditionalGeneration, "model.language_model", "model.visual"),
    "qwen2_5_vl": (qwen2_5_vl, Qwen2_5_VLForConditionalGeneration, "model.language_model", "model.visual"),
}

SPECIAL = ["[PAD]", "[UNK]", "<s>", "</s>", "<|im_end|>", "<image>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|im_start|>", "<|video_pad|>"]
WORDS = ["user", "assistant", "system", "USER", "ASSISTANT", ":", "?", ".", "is", "there", "a", "red", "blue", "round"]
WORDS += [
    "big",
    "circle",
    "square",
    "what",
    "color",
    "it",
    "shape",
    "the",
    "yes",
    "no",
    "and",
    "same",
    "INST",
    "[/",
    "[",
]
# Line by line what the templates of llava-hf and Qwen checkpoints do, written again.
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><image><|vision_end|>' }}"
    "{% elif c['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A few dozen words; LLaVA's begins with <s> and ends answers with </s>, Qwen's ends them with <|im_end|>."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    assert vocabulary["<image>"] == IMAGE and vocabulary["<|vision_end|>"] == VISION_END
    assert vocabulary["<|video_pad|>"] == VIDEO
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(SPECIAL[4:])  # also those that are not named below
    names = dict(pad_token="[PAD]", unk_token="[UNK]", bos_token=None, eos_token="<|im_end|>")
    if not family.startswith("qwen"):
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
        names |= dict(bos_token="<s>", eos_token="</s>")
    else:
        names |= dict(extra_special_tokens={"image_token": "<image>", "video_token": "<|video_pad|>"})
    return PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL[4:], **names)


def image_processor(family: str, backend: str = "pil") -> object:
    """Of the family's class, for images of 8 x 8; Qwen's makes 4 to 16 tokens of an image."""
    square, name = {"height": 8, "width": 8}, family if family.startswith("llava") else "qwen"
    settings = {
        "llava": dict(size={"shortest_edge": 8}, crop_size=square),
        "llava_next": dict(
            size={"shortest_edge": 8}, crop_size=square, image_grid_pinpoints=llava_next().image_grid_pinpoints
        ),
        "qwen": dict(patch_size=2, temporal_patch_size=2, merge_size=2, size=dict(shortest_edge=64, longest_edge=256)),
    }[name]
    pillow = {
        "llava": CLIPImageProcessorPil,
        "llava_next": LlavaNextImageProcessorPil,
        "qwen": Qwen2VLImageProcessorPil,
    }
    if backend == "pil":
        return pillow[name](**settings)
    module = {"llava": "clip.image_processing_clip", "llava_next": "llava_next.image_processing_llava_next"}
    module = module.get(name, "qwen2_vl.image_processing_qwen2_vl")
    made = torchvision_functions.imported(f"transformers.models.{module}")
    return getattr(made, pillow[name].__name__.removesuffix("Pil"))(**settings)


def write(folder: Path, family: str) -> str:
    """A model of that family with its tokenizer, image processor and chat template, as a transformers folder."""
    config, stock, *_ = FAMILIES[family]
    config = config()
    config.text_config.pad_token_id = 0
    model = stock(config)
    randomise(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    image_processor(family).save_pretrained(folder)
    if family.startswith("qwen"):
        films = dict(FILMS, video_processor_type="Qwen2VLVideoProcessor")
        Path(folder, "video_preprocessor_config.json").write_text(json.dumps(films))
    words = tokenizer(family)
    words.chat_template = CHATML if family.startswith("qwen") else VICUNA
    words.save_pretrained(folder)
    return str(folder)
