"""Families in small that give more features for a larger image, each in a manner of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.models.families.parts import IN_PATCHES, MROPE, QWEN_PATCHES, SMALL, TEXT, VISION, Tiny

MUSE = ("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")

GEMMA4_PATCHES = dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
GEMMA4 = dict(
    tokens=("<boi>", "<eoi>", "<|video|>", "<audio>", "<boa>", "<eoa>"),
    named={f"{name}_token": f"<{name}>" for name in ("image", "boi", "eoi", "audio", "boa", "eoa")},
    video="<|video|>",
)


def gemma4_ids(of: Callable[[str], int]) -> dict[str, int]:
    ids = {f"{name}_token_id": of(f"<{name}>") for name in ("image", "boi", "eoi", "audio")}
    return ids | {"video_token_id": of("<|video|>")}


def muse(of: Callable[[str], int], **text: Any) -> dict[str, Any]:
    return dict(
        text_config=dict(
            TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"], final_logit_softcapping=20.0
        )
        | dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
        | text,
        vision_config=dict(
            VISION,
            pos_emb_height=8,
            pos_emb_width=8,
            patch_temporal=2,
            merge_size=2,
            layer_types=["window_attention", "full_attention"],
        ),
        image_token_id=of("<|patch|>"),
        video_token_id=of("<|video|>"),
        out_hidden_size=64,
        projector_hidden_size=32,
    )


FAMILIES: dict[str, Tiny] = {
    "mistral3": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="mistral"),
            vision_config=dict(VISION, model_type="pixtral", head_dim=8, image_size=32),
            image_token_index=of("[IMG]"),
            spatial_merge_size=2,
        ),
        ("PixtralImageProcessorPil", dict(patch_size=4, size={"longest_edge": 32})),
        mark="[IMG]",
        image="[IMG]",
        tokens=("[IMG_BREAK]", "[IMG_END]"),
        processor=dict(patch_size=4, spatial_merge_size=2),
    ),
    "mistral_large4": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                num_key_value_heads=4,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                v_head_dim=8,
                qk_nope_head_dim=8,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                index_topk=32,
                index_head_dim=8,
                index_n_heads=2,
            ),
            vision_config=dict(VISION, model_type="pixtral", head_dim=8, image_size=32),
            image_token_index=of("[IMG]"),
            spatial_merge_size=2,
        ),
        ("PixtralImageProcessorPil", dict(patch_size=4, size={"longest_edge": 32})),
        mark="[IMG]",
        image="[IMG]",
        tokens=("[IMG_BREAK]", "[IMG_END]"),
        processor=dict(patch_size=4, spatial_merge_size=2),
    ),
    "lighton_ocr": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen3"),
            vision_config=dict(VISION, model_type="pixtral", head_dim=8, image_size=32),
            image_token_id=of("<|image_pad|>"),
            spatial_merge_size=2,
        ),
        ("PixtralImageProcessorPil", dict(patch_size={"height": 8, "width": 8}, size={"longest_edge": 32})),
        mark="<|image_pad|>",
        image="<|image_pad|>",
        tokens=("<break>", "<end>"),
        named=dict(image_token="<|image_pad|>", image_break_token="<break>", image_end_token="<end>"),
        processor=dict(patch_size=4, spatial_merge_size=2),
    ),
    "paddleocr_vl": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, rope_parameters=MROPE),
            vision_config=dict(VISION, spatial_merge_size=2),
            image_token_id=of("<image>"),
            video_token_id=of("<video>"),
            vision_start_token_id=of("<start>"),
            vision_end_token_id=of("<end>"),
        ),
        ("PaddleOCRVLImageProcessorPil", dict(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)),
        mark="<start><image><end>",
        tokens=("<start>", "<end>", "<video>"),
        named=dict(image_token="<image>"),
        video="<start><video><end>",
    ),
    "video_llama_3": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config=dict(VISION),
            image_token_id=of("<|image_pad|>"),
            video_token_id=of("<|video_pad|>"),
        ),
        ("VideoLlama3ImageProcessorPil", dict(patch_size=4, merge_size=1, min_pixels=64, max_pixels=1024)),
        mark="<|image_pad|>",
        image="<|image_pad|>",
        tokens=("<|video_pad|>",),
        video="<|video_pad|>",
        video_processor=("VideoLlama3VideoProcessor", IN_PATCHES),
    ),
    "ernie4_5_vl_moe": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                rope_parameters=MROPE | {"mrope_section": [1, 1, 2]},
                moe_intermediate_size=[16, 16],
                moe_k=2,
                moe_num_experts=4,
                moe_num_shared_experts=1,
            ),
            vision_config=dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=4),
            image_token_id=of("<|IMAGE_PLACEHOLDER|>"),
            image_start_token_id=of("<|IMAGE_START|>"),
            image_end_token_id=of("<|IMAGE_END|>"),
            video_token_id=of("<|video|>"),
            video_start_token_id=of("<|VIDEO_START|>"),
            video_end_token_id=of("<|VIDEO_END|>"),
        ),
        (
            "Ernie4_5_VLMoeImageProcessorPil",
            dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}),
        ),
        mark="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        image="<|IMAGE_PLACEHOLDER|>",
        tokens=("<|IMAGE_START|>", "<|IMAGE_END|>", "<|video|>", "<|VIDEO_START|>", "<|VIDEO_END|>"),
        named=dict(
            image_token="<|IMAGE_PLACEHOLDER|>",
            image_start_token="<|IMAGE_START|>",
            image_end_token="<|IMAGE_END|>",
            video_token="<|video|>",
            video_start_token="<|VIDEO_START|>",
            video_end_token="<|VIDEO_END|>",
        ),
        video="<|VIDEO_START|><|video|><|VIDEO_END|>",
        video_processor=("Ernie4_5_VLMoeVideoProcessor", dict(IN_PATCHES, draw_on_frames=False)),
    ),
    "hunyuan_vl": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
            ),
            vision_config=dict(
                VISION,
                num_key_value_heads=2,
                out_hidden_size=32,
                text_hidden_size=32,
                img_max_token_num=64,
                max_image_size=64,
                min_image_size=8,
            ),
            image_token_id=of("<image>"),
            im_start_id=of("<start>"),
            im_end_id=of("<end>"),
            im_newline_id=of("<newline>"),
        ),
        ("HunYuanVLImageProcessorPil", dict(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)),
        mark="<start><image><end>",
        tokens=("<start>", "<end>", "<newline>"),
        named=dict(image_token="<image>", image_start_token="<start>", image_end_token="<end>"),
    ),
    "kimi_k25": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                model_type="deepseek_v3",
                num_key_value_heads=4,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_nope_head_dim=8,
                qk_rope_head_dim=8,
                v_head_dim=8,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=16,
                first_k_dense_replace=1,
                n_shared_experts=1,
            ),
            vision_config=dict(VISION, pos_emb_height=8, pos_emb_width=8, pos_emb_time=4, merge_kernel_size=[2, 2]),
            projection_hidden_size=16,
            image_token_id=of("<|media_pad|>"),
            video_token_id=of("<|kimi_k25_video_placeholder|>"),
            vision_start_token_id=of("<|media_begin|>"),
            vision_end_token_id=of("<|media_end|>"),
        ),
        ("Kimi_K25ImageProcessor", dict(patch_size=4, merge_size=2, size=dict(max_height=32, max_width=32))),
        mark="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        image="<|media_pad|>",
        tokens=("<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"),
        video="<|kimi_k25_video_placeholder|>",
        video_processor=(
            "Kimi_K25VideoProcessor",
            dict(patch_size=4, merge_size=2, size=dict(max_height=32, max_width=32)),
        ),
    ),
    "muse_glimmer": Tiny(
        lambda of: muse(of),
        ("MuseGlimmerImageProcessor", dict(patch_size=4, merge_size=2, max_image_tokens=16)),
        mark="<|patch|>",
        image="<|patch|>",
        tokens=MUSE,
        video="<|video|>",
        video_processor=("MuseGlimmerVideoProcessor", dict(patch_size=4, merge_size=2, max_video_frame_tokens=8)),
    ),
    "muse_spark": Tiny(
        lambda of: (
            muse(
                of,
                moe_intermediate_size=16,
                num_local_experts=4,
                num_experts_per_tok=2,
                moe_hidden_size=16,
            )
            | dict(
                audio_config=dict(
                    patch_sizes=[4, 2],
                    hidden_sizes=[8, 16],
                    depths=[1, 1],
                    num_hidden_layers=2,
                    out_hidden_size=32,
                )
            )
        ),
        ("MuseGlimmerImageProcessor", dict(patch_size=4, merge_size=2, max_image_tokens=16)),
        mark="<|patch|>",
        image="<|patch|>",
        tokens=(*MUSE, "<|audio|>"),
        video="<|video|>",
        video_processor=("MuseGlimmerVideoProcessor", dict(patch_size=4, merge_size=2, max_video_frame_tokens=8)),
    ),
    "minimax_m3_vl": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                num_local_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                shared_intermediate_size=16,
                dense_intermediate_size=48,
                rotary_dim=8,
                layer_types=["full_attention", "full_attention"],
                mlp_layer_types=["dense", "sparse"],
            ),
            vision_config=dict(VISION, spatial_merge_size=2, temporal_patch_size=2),
            image_token_index=of("]<]image[>["),
            video_token_index=of("]<]video[>["),
            projector_hidden_size=32,
        ),
        ("MiniMaxM3VLImageProcessor", QWEN_PATCHES[1]),
        mark="]<]image[>[",
        image="]<]image[>[",
        tokens=("]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
        video="]<]video[>[",
        video_processor=("MiniMaxM3VLVideoProcessor", dict(patch_size=4, merge_size=2, size=SMALL)),
    ),
    "gemma4": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=96,
                per_layer_config={},
                final_logit_softcapping=20.0,
            ),
            vision_config=dict(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=24,
                patch_size=4,
                pooling_kernel_size=2,
                position_embedding_size=64,
            ),
            **gemma4_ids(of),
        ),
        ("Gemma4ImageProcessorPil", GEMMA4_PATCHES),
        **GEMMA4,
        video_processor=("Gemma4VideoProcessor", GEMMA4_PATCHES),
    ),
    "gemma4_unified": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
                final_logit_softcapping=20.0,
            ),
            vision_config=dict(
                patch_size=4, pooling_kernel_size=2, mm_embed_dim=16, mm_posemb_size=64, output_proj_dims=16
            ),
            **gemma4_ids(of),
        ),
        ("Gemma4UnifiedImageProcessor", GEMMA4_PATCHES),
        **GEMMA4,
        video_processor=(
            "Gemma4UnifiedVideoProcessor",
            GEMMA4_PATCHES,
        ),
    ),
    "inkling2": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                swa_num_attention_heads=4,
                swa_num_key_value_heads=2,
                swa_head_dim=8,
                sliding_window_size=8,
                d_rel=4,
                rel_extent=64,
                layer_types=["hybrid_sliding", "hybrid"],
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_layers_per_attn_res_block=1,
                unpadded_vocab_size=96,
            ),
            vision_config=dict(VISION, posemb_grid_size=8, projection_hidden_dim=32, text_hidden_size=32),
            image_token_id=of("<|unused_200054|>"),
        ),
        ("Inkling2ImageProcessor", dict(size={"height": 8, "width": 8})),
        mark="<|unused_200054|>",
        image="<|unused_200054|>",
    ),
}
