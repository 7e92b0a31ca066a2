"""Multimodal language models of every supported family with random weights, a few thousand each."""

from __future__ import annotations

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

WIDTH, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 48, 2
VOCABULARY = 64
# ids of the tokenizer that `tiny_mllm.write` saves with the model
IMAGE, VISION_START, VISION_END = 5, 6, 7
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
QWEN_IDS = dict(image_token_id=IMAGE, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
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
