"""Families in small that give the same number of features for every image."""

from __future__ import annotations

from tests.helpers.models.families.parts import FINE, SAM, SMALL, TEXT, VISION, Tiny

FAMILIES: dict[str, Tiny] = {
    "gemma3": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="gemma3_text", sliding_window=8, query_pre_attn_scalar=8),
            vision_config=dict(VISION),
            mm_tokens_per_image=4,
            image_token_index=of("<image_soft_token>"),
            boi_token_index=of("<boi>"),
            eoi_token_index=of("<eoi>"),
        ),
        ("Gemma3ImageProcessorPil", dict(size=SMALL)),
        mark="<boi>",
        image="<image_soft_token>",
        tokens=("<boi>", "<eoi>"),
        named=dict(image_token="<image_soft_token>", boi_token="<boi>", eoi_token="<eoi>"),
        processor=dict(image_seq_length=4),
    ),
    "paligemma": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="gemma", num_image_tokens=16),
            vision_config=dict(VISION, projection_dim=32),
            projection_dim=32,
            hidden_size=32,
            image_token_index=of("<image>"),
        ),
        ("SiglipImageProcessorPil", dict(size=SMALL, image_seq_length=16)),
        mark="",
    ),
    "vipllava": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=dict(VISION, model_type="clip_vision_model"),
            image_token_index=of("<image>"),
            vision_feature_layers=[-1, -2],
            vision_feature_layer=[-1, -2],
        ),
        ("CLIPImageProcessorPil", dict(size={"shortest_edge": 16}, crop_size=SMALL)),
        processor=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
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
    "aria": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            vision_config=dict(VISION, model_type="idefics3_vision", image_size=56, patch_size=14),
            image_token_index=of("<image>"),
            projector_patch_to_query_dict={1225: 4, 4900: 8},
        ),
        ("AriaImageProcessorPil", dict(max_image_size=490, min_image_size=28, split_image=False)),
        named=dict(image_token="<image>"),
        processor=dict(size_conversion={"490": 4, "980": 8}),
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
}
