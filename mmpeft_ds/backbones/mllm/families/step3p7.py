"""Step 3.7: large images are cut into parts, which its image processor calls patches and small images lack."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class Step3p7(Family):
    """Images in parts."""

    model_types = ("step3p7",)
    unpackable = ""
    compared = (("vision_patch_size", "patch_size"),)
    optional = ("pixel_values_local",)
    part_side = "patch_size"


ENTRY = Step3p7()
