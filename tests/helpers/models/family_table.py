"""Families of image-text-to-text models in small: what their configurations, processors and tokenizers need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=1024,
)
VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4
)
QWEN_VISION = dict(depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=4, out_hidden_size=32)
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
SMALL = {"height": 16, "width": 16}


@dataclass
class Tiny:
    """A family in small.

    Attributes:
        parts: keyword arguments of the configuration; `{}` of token ids are filled in.
        image_processor: class name and settings.
        mark: what the chat template writes for an image; empty: the checkpoint has no template.
        image: the token that stands for a feature of an image.
        tokens: further special tokens of the processor; `named` ones are attributes of the tokenizer.
        processor: settings of the processor.
        video: what the chat template writes for a video.
        video_processor: class name and settings; None for a family without videos.
    """

    parts: Callable[[Callable[[str], int]], dict[str, Any]]
    image_processor: tuple[str, dict[str, Any]]
    mark: str = "<image>"
    image: str = "<image>"
    tokens: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    video: str = "<video>"
    video_processor: tuple[str, dict[str, Any]] | None = None


IN_PATCHES = dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048})
QWEN_PATCHES = (
    "Qwen2VLImageProcessorPil",
    dict(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}),
)
IDEFICS = dict(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})

IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)),
)
OVIS = ("IMG_START", "IMG_GRID", "IMG_COL", "IMG_ROW", "IMG_END")
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


def qwen_ids(of: Callable[[str], int]) -> dict[str, int]:
    return dict(
        image_token_id=of("<|image_pad|>"),
        video_token_id=of("<|video_pad|>"),
        vision_start_token_id=of("<|vision_start|>"),
        vision_end_token_id=of("<|vision_end|>"),
    )


DEEP = dict(deepstack_visual_indexes=[0, 1])
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
QWEN3_5: dict[str, Any] = dict(
    rope_parameters=MROPE | {"partial_rotary_factor": 1.0},
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
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
    "idefics3": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="llama"),
            vision_config=VISION,
            image_token_id=of("<image>"),
            scale_factor=2,
        ),
        ("Idefics3ImageProcessorPil", IDEFICS),
        tokens=(
            "<fake_token_around_image>",
            "<global-img>",
            "<end_of_utterance>",
            *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)),
        ),
        processor=dict(image_seq_len=4),
    ),
    "qwen3_vl": Tiny(
        lambda of: qwen3(of, DEEP, rope_parameters=MROPE), QWEN_PATCHES, **QWEN, video_processor=QWEN3_FILMS
    ),
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
    "llava_onevision": Tiny(
        lambda of: dict(
            text_config=dict(TEXT, model_type="qwen2"),
            vision_config=VISION,
            image_token_index=of("<image>"),
            video_token_index=of("<video>"),
            image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]],
        ),
        (
            "LlavaOnevisionImageProcessorPil",
            dict(size=SMALL, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16], [32, 32]]),
        ),
        tokens=("<video>",),
        processor=dict(num_image_tokens=16, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9"),
        video_processor=("LlavaOnevisionVideoProcessor", dict(size=SMALL)),
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
            image_token_id=of("<image>"),
            boi_token_id=of("<boi>"),
            eoi_token_id=of("<eoi>"),
            video_token_id=of("<|video|>"),
            audio_token_id=of("<audio>"),
        ),
        ("Gemma4ImageProcessorPil", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
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
        video_processor=("Gemma4VideoProcessor", dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)),
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
    "qwen3_5": Tiny(lambda of: qwen3(of, **QWEN3_5), QWEN_PATCHES, **QWEN, video_processor=QWEN3_FILMS),
    "qwen3_5_moe": Tiny(
        lambda of: qwen3(of, **QWEN3_5, **EXPERTS, shared_expert_intermediate_size=16),
        QWEN_PATCHES,
        video_processor=QWEN3_FILMS,
        **QWEN,
    ),
    "qwen3_vl_moe": Tiny(
        lambda of: qwen3(of, DEEP, rope_parameters=MROPE, num_local_experts=4, **EXPERTS),
        QWEN_PATCHES,
        video_processor=QWEN3_FILMS,
        **QWEN,
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
}
