"""Families in small that cut a large image into tiles."""

from __future__ import annotations

from collections.abc import Callable

from tests.helpers.models.families.parts import FINE, QWEN3_5, SAM, SMALL, TEXT, VISION, Tiny

IDEFICS = dict(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)),
)
OVIS = ("IMG_START", "IMG_GRID", "IMG_COL", "IMG_ROW", "IMG_END")
LLAMA4_TOKENS = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>")
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


def minicpm_marks(of: Callable[[str], int]) -> dict[str, int]:
    marks = {name.replace("_token", "_id"): of(token) for name, token in MINICPM.items() if "id_" not in name}
    return {**marks, "newline_id": of("a")}


FAMILIES: dict[str, Tiny] = {
    "internvl": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config=dict(VISION, image_size=[16, 16], patch_size=[4, 4]),
            image_token_id=of("<IMG_CONTEXT>"),
            image_seq_length=4,
        ),
        ("GotOcr2ImageProcessorPil", dict(size=SMALL, crop_to_patches=True, max_patches=4)),
        mark="<IMG_CONTEXT>",
        image="<IMG_CONTEXT>",
        tokens=("<img>", "</img>", "<video>"),
        named=dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        processor=dict(image_seq_length=4),
        video_processor=("InternVLVideoProcessor", dict(size=SMALL)),
    ),
    "qianfan_ocr": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen3"),
            vision_config=dict(VISION, image_size=[16, 16], patch_size=[4, 4]),
            image_token_id=of("<IMG_CONTEXT>"),
            image_seq_length=4,
        ),
        ("GotOcr2ImageProcessorPil", dict(size=SMALL, crop_to_patches=True, max_patches=4)),
        mark="<image>",
        image="<IMG_CONTEXT>",
        tokens=("<img>", "</img>", "<image>"),
        named=dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            image_token="<IMG_CONTEXT>",
        ),
        processor=dict(image_seq_length=4),
    ),
    "idefics3": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=VISION,
            image_token_id=of("<image>"),
            scale_factor=2,
        ),
        ("Idefics3ImageProcessorPil", IDEFICS),
        tokens=IDEFICS_TOKENS,
        processor=dict(image_seq_len=4),
    ),
    "smolvlm": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=VISION,
            image_token_id=of("<image>"),
            scale_factor=2,
        ),
        ("SmolVLMImageProcessorPil", IDEFICS),
        tokens=IDEFICS_TOKENS,
        processor=dict(image_seq_len=4),
        video_processor=(
            "SmolVLMVideoProcessor",
            dict(size={"longest_edge": 16}, max_image_size={"longest_edge": 16}),
        ),
    ),
    "granite_docling": Tiny(
        lambda of: dict(
            text_config=TEXT,
            vision_config=dict(VISION, scale_factor=2, out_hidden_size=32, deepstack_visual_indexes=[0, 1]),
            image_token_id=of("<image>"),
        ),
        ("GraniteDoclingImageProcessorPil", dict(size=SMALL, max_patches=4)),
        tokens=IDEFICS_TOKENS,
        processor=dict(image_seq_len=4),
    ),
    "aya_vision": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="cohere2", sliding_window=8, logit_scale=1.0),
            vision_config=VISION,
            image_token_index=of("<|IMG_PATCH|>"),
            vision_feature_layer=-1,
        ),
        ("GotOcr2ImageProcessorPil", dict(size=SMALL, crop_to_patches=True, max_patches=4)),
        image="<|IMG_PATCH|>",
        tokens=(
            "<image>",
            "<|START_OF_IMG|>",
            "<|END_OF_IMG|>",
            "<|IMG_LINE_BREAK|>",
            "TILE_GLOBAL",
            *(f"TILE_{i}" for i in range(1, 5)),
        ),
        processor=dict(patch_size=8, img_size=16, downsample_factor=1),
    ),
    "cohere2_vision": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="cohere2", sliding_window=8),
            vision_config=dict(VISION, model_type="siglip_vision_model", image_size=32),
            downsample_factor=2,
            alignment_intermediate_size=32,
            image_token_id=of("<|IMG_PATCH|>"),
        ),
        ("Cohere2VisionImageProcessor", dict(size={"height": 32, "width": 32}, patch_size=4, max_patches=4)),
        mark="<|IMG_PATCH|>",
        image="<|IMG_PATCH|>",
        tokens=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>"),
        named=dict(
            image_token="<|IMG_PATCH|>",
            boi_token="<|START_OF_IMG|>",
            eoi_token="<|END_OF_IMG|>",
            img_line_break_token="<|IMG_LINE_BREAK|>",
        ),
    ),
    "ovis2": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config=dict(VISION, vocab_size=64, hidden_stride=2),
            image_token_id=of("<IMG_ATOM>"),
            visual_indicator_token_ids=[of(f"<{t}>") for t in OVIS],
            vocab_size=96,
            hidden_size=32,
        ),
        ("Ovis2ImageProcessorPil", dict(size=SMALL, crop_to_patches=True, max_patches=4)),
        image="<IMG_ATOM>",
        tokens=("<image>", *(f"<{t}>" for t in OVIS)),
        processor=dict(image_seq_length=4),
    ),
    "llava_onevision": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config=VISION,
            image_token_index=of("<image>"),
            video_token_index=of("<video>"),
            image_grid_pinpoints=PINPOINTS,
        ),
        ("LlavaOnevisionImageProcessorPil", dict(size=SMALL, image_grid_pinpoints=PINPOINTS)),
        tokens=("<video>",),
        processor=dict(num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9"),
        video_processor=("LlavaOnevisionVideoProcessor", dict(size=SMALL)),
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
    "lfm2_vl": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48),
            vision_config=dict(VISION, model_type="siglip2_vision_model", num_patches=16),
            downsample_factor=2,
            projector_hidden_size=32,
            image_token_id=of("<image>"),
        ),
        (
            "Lfm2VlImageProcessor",
            dict(encoder_patch_size=4, tile_size=16, min_image_tokens=2, max_image_tokens=4, max_tiles=4),
        ),
        tokens=(
            "<|image_start|>",
            "<|image_end|>",
            "<|img_thumbnail|>",
            *(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)),
        ),
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
