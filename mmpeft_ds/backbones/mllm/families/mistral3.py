"""Mistral 3 and what else sees through Pixtral: rows of patches with a token between them.

transformers' own processor asks for torchvision although nothing in it does, so that its rule stands here.
"""

# Rows of image tokens, a break after each, an end after the last: transformers, pixtral/processing_pixtral.py

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, ProcessorMixin

from mmpeft_ds.backbones.mllm.families.base import Family


class PixtralProcessor(ProcessorMixin):
    """Image processor and tokenizer, and how they spell an image."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
    ):
        super().__init__(image_processor, tokenizer)
        self.cell = patch_size * spatial_merge_size
        self.image_token, self.between, self.end = image_token, image_break_token, image_end_token

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        return super()._process_images(images, **{**kwargs, "patch_size": self.cell})

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Rows of image tokens with a break between them, and the end.

        Raises:
            ValueError: for an image of one token, which the model cannot read where it is the only one of a batch.
        """
        height, width = (int(side) // self.cell for side in image_inputs["image_sizes"][image_idx])
        if height * width == 1:
            raise ValueError(f"an image of less than {self.cell} pixels a side is one token, and Mistral 3 needs two")
        return self.between.join([self.image_token * width] * height) + self.end


class Mistral3(Family):
    """Images in rows of patches."""

    model_types = ("mistral3",)
    processor = PixtralProcessor
    unpackable = ""

    def processor_settings(self, config: PretrainedConfig) -> dict[str, Any]:
        return {"patch_size": config.vision_config.patch_size, "spatial_merge_size": config.spatial_merge_size}


ENTRY = Mistral3()
