"""GLM-4.1V and its kin: frames of videos are spelled with the token of images, between tokens that enclose a video."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Glm4v(Family):
    """One token for images and videos."""

    model_types = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga")
    one_token = True
    patches = model_types
    unpackable = ""


ENTRY = Glm4v()
