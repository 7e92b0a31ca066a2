"""What several families in small are made of, and what a family in small is."""

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
QWEN3_5: dict[str, Any] = dict(
    rope_parameters=MROPE | {"partial_rotary_factor": 1.0},
    layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
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
