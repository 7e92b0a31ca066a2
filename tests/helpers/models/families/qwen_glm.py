"""Families in small whose images are patches in the manner of Qwen2-VL or GLM-4V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.models.families.parts import (
    IN_PATCHES,
    MROPE,
    QWEN3_5,
    QWEN_PATCHES,
    QWEN_VISION,
    TEXT,
    VISION,
    Tiny,
)

QWEN: dict[str, Any] = dict(
    mark="<|vision_start|><|image_pad|><|vision_end|>",
    image="<|image_pad|>",
    tokens=("<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
QWEN2_FILMS = ("Qwen2VLVideoProcessor", IN_PATCHES)
QWEN3_FILMS = ("Qwen3VLVideoProcessor", IN_PATCHES)
GLM: dict[str, Any] = dict(
    mark="<|begin_of_image|><|image|><|end_of_image|>",
    image="<|image|>",
    tokens=("<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
    video="<|begin_of_video|><|video|><|end_of_video|>",
)
GLM_PATCHES = (
    "Glm4vImageProcessorPil",
    dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}),
)
VISION_MARKS: dict[str, Any] = dict(
    mark="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    image="<|IMAGE_PAD|>",
    tokens=("<|VISION_START|>", "<|VISION_END|>", "<|VIDEO_PAD|>"),
    video="<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
)
DEEP = dict(deepstack_visual_indexes=[0, 1])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def qwen_ids(of: Callable[[str], int]) -> dict[str, int]:
    return dict(
        image_token_id=of("<|image_pad|>"),
        video_token_id=of("<|video_pad|>"),
        vision_start_token_id=of("<|vision_start|>"),
        vision_end_token_id=of("<|vision_end|>"),
    )


def qwen3(of: Callable[[str], int], vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    return dict(
        text_config=dict(TEXT, **text),
        vision_config=dict(QWEN_VISION, num_position_embeddings=64, **(vision or {})),
        **qwen_ids(of),
    )


def glm(of: Callable[[str], int], **text: Any) -> dict[str, Any]:
    return dict(
        text_config=dict(TEXT) | dict(rope_parameters=MROPE) | text,
        vision_config=dict(QWEN_VISION, image_size=16),
        image_token_id=of("<|image|>"),
        image_start_token_id=of("<|begin_of_image|>"),
        image_end_token_id=of("<|end_of_image|>"),
        video_token_id=of("<|video|>"),
        video_start_token_id=of("<|begin_of_video|>"),
        video_end_token_id=of("<|end_of_video|>"),
    )


FAMILIES: dict[str, Tiny] = {
    "qwen3_vl": Tiny(
        lambda of: qwen3(of, DEEP, rope_parameters=MROPE), QWEN_PATCHES, **QWEN, video_processor=QWEN3_FILMS
    ),
    "qwen3_vl_moe": Tiny(
        lambda of: qwen3(of, DEEP, rope_parameters=MROPE, num_local_experts=4, **EXPERTS),
        QWEN_PATCHES,
        video_processor=QWEN3_FILMS,
        **QWEN,
    ),
    "qwen3_5": Tiny(lambda of: qwen3(of, **QWEN3_5), QWEN_PATCHES, **QWEN, video_processor=QWEN3_FILMS),
    "qwen3_5_moe": Tiny(
        lambda of: qwen3(of, **QWEN3_5, **EXPERTS, shared_expert_intermediate_size=16),
        QWEN_PATCHES,
        video_processor=QWEN3_FILMS,
        **QWEN,
    ),
    "qwen4_exp": Tiny(
        lambda of: qwen3(
            of,
            **{**QWEN3_5, "layer_types": ["linear_attention", "indexed_attention"]},
            **EXPERTS,
            shared_expert_intermediate_size=16,
            hc_count=2,
            hc_lowrank=8,
            indexer_n_heads=2,
            indexer_kv_heads=1,
            indexer_head_dim=8,
            indexer_budget=32,
            indexer_compress_ratio=4,
        ),
        QWEN_PATCHES,
        **QWEN,
        video_processor=QWEN3_FILMS,
    ),
    "exaone4_5": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="exaone4", sliding_window=8, sliding_window_pattern=4),
            vision_config=dict(QWEN_VISION, num_key_value_heads=1, window_size=16, fullatt_block_indexes=[1]),
            image_token_id=of("<|image_pad|>"),
            video_token_id=of("<|video_pad|>"),
        ),
        QWEN_PATCHES,
        **QWEN,
        video_processor=QWEN2_FILMS,
    ),
    "hyperclovax_vision_v2": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="hyperclovax", logits_scaling=2.0),
            vision_config=dict(
                QWEN_VISION,
                model_type="qwen2_5_vl_vision",
                window_size=16,
                fullatt_block_indexes=[1],
                out_hidden_size=32,
            ),
            image_token_id=of("<|image_pad|>"),
            video_token_id=of("<|video_pad|>"),
        ),
        QWEN_PATCHES,
        **QWEN,
        video_processor=QWEN2_FILMS,
    ),
    "lfm3_vl": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                layer_types=["conv", "full_attention"],
                sliding_window=8,
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                },
            ),
            vision_config=dict(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=24,
                patch_size=4,
                layer_types=["conv", "full_attention"],
            ),
            projector_hidden_size=32,
            **qwen_ids(of),
        ),
        QWEN_PATCHES,
        **QWEN,
        video_processor=QWEN3_FILMS,
    ),
    "cosmos3_edge": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, rope_parameters=MROPE | {"mrope_section": [2, 1, 1]}),
            vision_config=dict(VISION, num_patches=16, spatial_merge_size=2),
            projector_hidden_size=32,
            **qwen_ids(of),
        ),
        ("Cosmos3EdgeImageProcessorPil", QWEN_PATCHES[1]),
        **QWEN,
        video_processor=("Cosmos3EdgeVideoProcessor", IN_PATCHES),
    ),
    "cosmos3_omni": Tiny(
        lambda of: qwen3(of, DEEP, rope_parameters=MROPE),
        QWEN_PATCHES,
        **QWEN,
        processor=dict(processor_class="Qwen3VLProcessor"),
        video_processor=QWEN3_FILMS,
    ),
    "cohere_compass": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, sliding_window=8, logit_scale=0.5, rope_parameters={"full_attention": MROPE}),
            vision_config=dict(QWEN_VISION, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]),
            image_token_id=of("<|IMAGE_PAD|>"),
            video_token_id=of("<|VIDEO_PAD|>"),
            vision_start_token_id=of("<|VISION_START|>"),
            vision_end_token_id=of("<|VISION_END|>"),
        ),
        ("CohereCompassImageProcessorPil", QWEN_PATCHES[1]),
        **VISION_MARKS,
        video_processor=("CohereCompassVideoProcessor", IN_PATCHES),
    ),
    "glm4v": Tiny(lambda of: glm(of), GLM_PATCHES, **GLM, video_processor=("Glm4vVideoProcessor", IN_PATCHES)),
    "glm46v": Tiny(
        lambda of: glm(of),
        ("Glm46VImageProcessorPil", GLM_PATCHES[1]),
        **GLM,
        video_processor=("Glm46VVideoProcessor", IN_PATCHES),
    ),
    "glm4v_moe": Tiny(
        lambda of: glm(
            of,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            rope_parameters=MROPE | {"partial_rotary_factor": 1.0},
        ),
        GLM_PATCHES,
        **GLM,
        video_processor=("Glm4vVideoProcessor", IN_PATCHES),
    ),
    "glm_ocr": Tiny(
        lambda of: glm(of, rope_parameters=MROPE),
        ("Glm46VImageProcessorPil", GLM_PATCHES[1]),
        **GLM,
        processor=dict(processor_class="Glm46VProcessor"),
        video_processor=("Glm46VVideoProcessor", IN_PATCHES),
    ),
    "glmga": Tiny(
        lambda of: glm(of),
        ("GlmgaImageProcessorPil", GLM_PATCHES[1]),
        **GLM,
        processor=dict(processor_class="Glm46VProcessor"),
        video_processor=("GlmgaVideoProcessor", IN_PATCHES),
    ),
    "glm5_next": Tiny(
        lambda of: glm(
            of,
            head_dim=0,
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            v_head_dim=8,
            qk_nope_head_dim=8,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["linear_attention", "indexed_attention"],
            index_topk=32,
            index_head_dim=8,
            index_n_heads=2,
            index_kpool=4,
            linear_head_dim=8,
            linear_num_heads=4,
            hc_mult=2,
        ),
        ("Glm5NextImageProcessorPil", dict(patch_size=4, merge_size=2, min_image_tokens=1, max_image_tokens=16)),
        **GLM,
        video_processor=(
            "Glm5NextVideoProcessor",
            dict(patch_size=4, merge_size=2, min_image_tokens=1, max_image_tokens=64),
        ),
    ),
}
