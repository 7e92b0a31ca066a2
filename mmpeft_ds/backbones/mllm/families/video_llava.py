"""Video-LLaVA: its image processor has a name of its own for pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mmpeft_ds.backbones.mllm.families.base import Family


class VideoLlava(Family):
    """Pixels by another name."""

    model_types = ("video_llava",)
    unpackable = ""
    no_videos = "transformers gives features of its frames without saying whose they are"

    def together(self, media: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return super().together([{_NAMES.get(name, name): value for name, value in one.items()} for one in media])


_NAMES = {"pixel_values_images": "pixel_values"}
ENTRY = VideoLlava()
