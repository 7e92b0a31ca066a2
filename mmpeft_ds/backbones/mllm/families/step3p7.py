"""Step 3.7: large images are cut into parts, which its image processor calls patches and small images lack."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Step3p7(Family):
    """Images in parts."""

    model_types = ("step3p7",)
    unsplittable = "runs its vision tower once more for images in parts, which other ranks need not have"
    unpackable = ""
    compared = (("vision_patch_size", "patch_size"),)
    optional = ("pixel_values_local",)


ENTRY = Step3p7()
