"""Operations of a frozen multimodal language model per token, per patch and per pair of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmpeft_ds.data.token_counts import TokenCounts

# Names under which families have these in their configurations, the first that is there.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k")
_DEPTH = ("depth", "num_hidden_layers")
_WIDTH = ("embed_dim", "hidden_size")
_BEHIND = ("merger", "projector", "connector")  # in names of modules
PATCH = 14  # side of a patch where a configuration has none


@dataclass(frozen=True)
class Costs:
    """Over the cost of a token in the weights of the language model, which is computed forward and backward to its
    inputs; the vision tower is computed forward alone, as it is without adapters in it.

    Attributes:
        pair: two tokens of a text that causal attention compares, of which half are.
        patch: in the weights of the vision tower.
        image_token: in the weights after it, where patches have become tokens.
        patch_pair: two patches that the vision tower reads together.
    """

    pair: float
    patch: float
    image_token: float
    patch_pair: float

    @staticmethod
    def of(model: PreTrainedModel) -> Costs:
        """Costs of a model, which may be on the meta device.

        A weight is 2 operations per token forward and 2 backward. Attention over t tokens of width d is 4 t^2 d per
        layer forward, half of it under a causal mask, and twice that backward.
        """
        decoder, text = model.get_decoder(), model.config.get_text_config()
        embeddings = {id(p) for p in decoder.get_input_embeddings().parameters()}
        active = _first(text, _ACTIVE, 0)
        weights = sum(_used(p, active) for p in decoder.parameters() if id(p) not in embeddings)
        within = {id(p) for p in decoder.parameters()}
        others = {n: p.numel() for n, p in model.inner.named_parameters() if id(p) not in within}
        behind = sum(size for name, size in others.items() if any(word in name for word in _BEHIND))
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = text.num_attention_heads * heads
        vision = getattr(model.config, "vision_config", None)
        depth = len(getattr(vision, "fullatt_block_indexes", None) or range(_first(vision, _DEPTH, 0)))
        return Costs(
            pair=1.5 * width * kinds.count("full_attention") / weights,
            patch=(sum(others.values()) - behind) / (2 * weights),
            image_token=behind / (2 * weights),
            patch_pair=_first(vision, _WIDTH, 0) * depth / weights,
        )

    def total(self, counts: TokenCounts) -> Any:
        """Cost of a sample, or of an array of many."""
        vision = counts.patches * self.patch + counts.patch_pairs * self.patch_pair
        return counts.tokens + counts.pairs * self.pair + vision + counts.of_images * self.image_token


def patch_side(vision: Any) -> int:
    """Side of the patches that a vision tower reads, by its configuration."""
    side = getattr(vision, "patch_size", None) or PATCH
    return side if isinstance(side, int) else side[0]


def patches_of(image: Mapping[str, Tensor], side: int) -> tuple[int, int]:
    """Patches of what the processor made of an image, and the squares of those that are read together: of the whole
    image where they stand flat, (..., patches, values), else of each tile (..., 3, H, W)."""
    shape = next((tuple(v.shape) for name, v in image.items() if name.startswith("pixel_values")), (0, 0))
    if len(shape) <= 3:
        together, parts = shape[-2], prod(shape[:-2])
    else:
        together, parts = (shape[-2] // side) * (shape[-1] // side), prod(shape[:-3])
    return together * parts, together**2 * parts


def _used(parameter: nn.Parameter, active: int) -> float:
    """Weights that a token passes: of experts, which stand in one tensor, only those that it is sent to."""
    if parameter.dim() == 3 and 0 < active < parameter.shape[0]:
        return parameter.numel() * active / parameter.shape[0]
    return parameter.numel()


def _first(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((value for n in names if isinstance(value := getattr(config, n, None), int)), default)
