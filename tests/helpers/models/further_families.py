"""More families of image-text-to-text models in small, beside those of `family_table`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.models.family_table import (
    DEEP,
    EXPERTS,
    GLM,
    GLM_PATCHES,
    IN_PATCHES,
    MROPE,
    QWEN,
    QWEN3_5,
    QWEN3_FILMS,
    QWEN_PATCHES,
    QWEN_VISION,
    SMALL,
    TEXT,
    VISION,
    Tiny,
    glm,
    qwen3,
    qwen_ids,
)

VISION_MARKS: dict[str, Any] = dict(
    mark="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
    image="<|IMAGE_PAD|>",
    tokens=("<|VISION_START|>", "<|VISION_END|>", "<|VIDEO_PAD|>"),
    video="<|VISION_START|><|VIDEO_PAD|><|VISION_END|>",
)
LLAMA4_TOKENS = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
MUSE = ("<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>")
MINICPM = dict(
    image_start_token="<img>",
    image_end_token="</img>",
    slice_start_token="<slice>",
    slice_end_token="</slice>",
    image_id_start_token="<image_id>",
    image_id_end_token="</image_id>",
)
DEEPSEEK_EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1)
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
SAM = dict(
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=64,
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1],
    mlp_dim=24,
)
# 64 x 64 patches, of which parts see only windows: some models make a fixed number of tokens of so many
FINE = dict(image_size=128, patch_size=2, window_size=8, global_attn_indexes=[])


def minicpm_marks(of: Callable[[str], int]) -> dict[str, int]:
    marks = {name.replace("_token", "_id"): of(token) for name, token in MINICPM.items() if "id_" not in name}
    return {**marks, "newline_id": of("a")}


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
    "llama4": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                intermediate_size_mlp=48,
                num_local_experts=4,
                moe_layers=[1],
                attention_chunk_size=8,
                no_rope_layers=[1, 0],
                attn_temperature_tuning=False,
            ),
            vision_config=dict(
                VISION,
                intermediate_size=64,
                vision_output_dim=32,
                projector_input_dim=32,
                projector_output_dim=32,
                vision_feature_layer=-1,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ),
            image_token_index=of("<|patch|>"),
            boi_token_index=of("<|image_start|>"),
            eoi_token_index=of("<|image_end|>"),
        ),
        ("Llama4ImageProcessor", dict(size=SMALL, max_patches=4)),
        mark="<|image|>",
        image="<|patch|>",
        tokens=LLAMA4_TOKENS,
        processor=dict(patch_size=4, pixel_shuffle_ratio=0.5),
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
    "llava_next_video": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="clip_vision_model"),
            image_token_index=of("<image>"),
            video_token_index=of("<video>"),
            image_grid_pinpoints=PINPOINTS,
        ),
        (
            "LlavaNextImageProcessorPil",
            dict(size={"shortest_edge": 16}, crop_size=SMALL, image_grid_pinpoints=PINPOINTS),
        ),
        tokens=("<video>",),
        processor=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
        video_processor=("LlavaNextVideoVideoProcessor", dict(size={"shortest_edge": 16}, crop_size=SMALL)),
    ),
    "got_ocr2": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config={**SAM, **FINE},
            image_token_index=of("<imgpad>"),
            image_seq_length=256,
        ),
        ("GotOcr2ImageProcessorPil", dict(size={"height": 128, "width": 128}, crop_to_patches=False)),
        mark="<imgpad>",
        image="<imgpad>",
        tokens=("<img>", "</img>"),
    ),
    "deepseek_ocr2": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, **DEEPSEEK_EXPERTS, mlp_layer_types=["dense", "sparse"]),
            vision_config=dict(
                sam_config={**SAM, **FINE, "downsample_channels": [8, 16]},
                encoder_config=dict(TEXT, hidden_size=16, num_key_value_heads=4),
            ),
            image_token_id=of("<image>"),
        ),
        ("DeepseekOcr2ImageProcessorPil", dict(size={"height": 128, "width": 128}, tile_size=96, max_patches=2)),
        processor=dict(patch_size=2, downsample_ratio=4),
    ),
    "unlimited_ocr": Tiny(
        lambda of: dict(
            text_config=dict(
                {**TEXT, "num_key_value_heads": 4},
                **DEEPSEEK_EXPERTS,
                sliding_window=8,
                mlp_layer_types=["dense", "sparse"],
            ),
            vision_config=dict(
                sam_config=dict(SAM, downsample_channels=[8, 16]),
                encoder_config=dict(VISION, image_size=16),
            ),
            image_token_id=of("<image>"),
        ),
        ("UnlimitedOcrImageProcessor", dict(size={"height": 64, "width": 64}, tile_size=32)),
        processor=dict(patch_size=4, downsample_ratio=4),
    ),
    "granite4_vision": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, logits_scaling=2.0),
            vision_config=dict(VISION, model_type="siglip_vision_model", hidden_size=64),
            qformer_config=dict(
                model_type="blip_2_qformer", num_hidden_layers=1, intermediate_size=24, num_attention_heads=1
            ),
            image_token_index=of("<image>"),
            image_grid_pinpoints=PINPOINTS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
            downsample_rate="1/2",
            deepstack_layer_map=[[-1, 0], [-2, 1]],
            spatial_target_layers=[0, 0, 1, 1],
        ),
        (
            "LlavaNextImageProcessorPil",
            dict(size={"shortest_edge": 16}, crop_size=SMALL, image_grid_pinpoints=PINPOINTS),
        ),
        processor=dict(patch_size=4, vision_feature_select_strategy="full", downsample_rate="1/2"),
    ),
    "step3p7": Tiny(
        lambda of: dict(
            text_config=dict(
                TEXT,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                share_expert_dim=16,
                sliding_window=8,
                layer_types=["sliding_attention", "full_attention"],
                mlp_layer_types=["dense", "sparse"],
            ),
            vision_config=dict(VISION, image_size=32),
            image_token_id=of("<im_patch>"),
        ),
        (
            "Step3p7ImageProcessor",
            dict(size={"height": 32, "width": 32}, patch_size=16, vision_patch_size=4, downsampler_stride=4),
        ),
        mark="<im_patch>",
        image="<im_patch>",
        tokens=("<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"),
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
    "molmo2": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, additional_vocab_size=16),
            vision_config=dict(VISION, num_key_value_heads=2, head_dim=8, image_size=[16, 16]),
            adapter_config=dict(
                hidden_size=16,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
                intermediate_size=24,
                text_hidden_size=32,
                vision_feature_layer=[-1, -2],
            ),
            image_patch_id=of("<im_patch>"),
            image_start_token_id=of("<im_start>"),
            low_res_image_start_token_id=of("<low_res_im_start>"),
            image_end_token_id=of("<im_end>"),
            frame_start_token_id=of("<frame_start>"),
            frame_end_token_id=of("<frame_end>"),
        ),
        (
            "Molmo2ImageProcessor",
            dict(size=SMALL, patch_size=4, max_crops=4, overlap_margins=[1, 1], pooling_size=[2, 2]),
        ),
        mark="<|image|>",
        image="<im_patch>",
        tokens=(
            *("<|image|>", "<|video|>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"),
            *("<im_end>", "<frame_end>", "<im_low>"),
        ),
        video="<|video|>",
        video_processor=("Molmo2VideoProcessor", dict(size=SMALL, patch_size=4, pooling_size=[2, 2])),
    ),
    "video_llava": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="clip_vision_model"),
            image_token_index=of("<image>"),
            video_token_index=of("<video>"),
        ),
        ("VideoLlavaImageProcessor", dict(size={"shortest_edge": 16}, crop_size=SMALL)),
        tokens=("<video>",),
        processor=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
        video_processor=("VideoLlavaVideoProcessor", dict(size={"shortest_edge": 16}, crop_size=SMALL)),
    ),
    "deepseek_vl": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            image_token_id=of("<image>"),
        ),
        ("DeepseekVLImageProcessorPil", dict(size=SMALL, min_size=4)),
        named=dict(image_token="<image>"),
        processor=dict(num_image_tokens=16),
    ),
    "deepseek_vl_hybrid": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="siglip_vision_model"),
            high_res_vision_config=dict(SAM, model_type="sam_vision_model"),
            image_token_id=of("<image>"),
        ),
        (
            "DeepseekVLHybridImageProcessorPil",
            dict(size=SMALL, min_size=4, high_res_size={"height": 64, "width": 64}),
        ),
        named=dict(image_token="<image>"),
        processor=dict(num_image_tokens=16),
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
            image_token_id=of("<image>"),
            boi_token_id=of("<boi>"),
            eoi_token_id=of("<eoi>"),
            video_token_id=of("<|video|>"),
            audio_token_id=of("<audio>"),
        ),
        ("Gemma4UnifiedImageProcessor", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
        tokens=("<boi>", "<eoi>", "<|video|>", "<audio>", "<boa>", "<eoa>"),
        named=dict(
            image_token="<image>",
            boi_token="<boi>",
            eoi_token="<eoi>",
            audio_token="<audio>",
            boa_token="<boa>",
            eoa_token="<eoa>",
        ),
        video="<|video|>",
        video_processor=(
            "Gemma4UnifiedVideoProcessor",
            dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        ),
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
    **{
        name: Tiny(
            lambda of, name=name: dict(
                text_config=dict(TEXT, model_type="qwen3_5_text", **QWEN3_5),
                vision_config=dict(VISION, num_hidden_layers=3, insert_layer_id=1),
                insert_layer_id=1,
                image_token_id=of("<image>"),
                video_token_id=of("<video>"),
                **({} if name != "minicpmv4_7" else minicpm_marks(of)),
            ),
            (f"{kind}ImageProcessor" + form, dict(scale_resolution=32, patch_size=4, max_slice_nums=4)),
            tokens=("<video>", *MINICPM.values()),
            named=dict(image_token="<image>", video_token="<video>", **MINICPM),
            video_processor=(f"{video}VideoProcessor", dict(scale_resolution=32, patch_size=4, max_slice_nums=1)),
        )
        for name, kind, form, video in (
            ("minicpmv4_6", "MiniCPMV4_6", "Pil", "MiniCPMV4_6"),
            ("minicpmv4_7", "MiniCPMV4_6", "Pil", "MiniCPMV4_6"),
            ("minicpm_ocr", "MiniCPMOcr", "", "MiniCPMOcr"),
        )
    },
}
