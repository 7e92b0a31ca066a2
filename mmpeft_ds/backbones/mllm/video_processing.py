"""Videos through a checkpoint's own processor, whether or not torchvision is installed, which transformers wants."""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import transformers
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin, video_processing_utils
from transformers.models.auto import auto_mappings

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.mllm import torchvision_functions
from mmpeft_ds.backbones.mllm.processing import spelled
from mmpeft_ds.data.batch import Spelled
from mmpeft_ds.data.video import Video
from mmpeft_ds.errors import BadInput


@dataclass(frozen=True)
class VideoTransform:
    """A video -> what the whole processor makes of it, normalised, and how the text spells it.

    All frames are taken: how many a video has is decided when it is prepared.

    Attributes:
        processor: the whole processor, with its part for videos.
        alone: a text with one video and nothing else.
        tokens: of which each stands for one feature.
        max_pixels: larger frames are scaled down to this many, before the processor sees them; 0 = as they are.
    """

    processor: Any
    alone: str
    tokens: tuple[str, ...]
    max_pixels: int = 0

    def __call__(self, video: Video) -> Spelled:
        times = video.times
        # Times are given in frames of one second each, which need not be whole ones.
        metadata = dict(
            fps=1.0, total_num_frames=times.duration, duration=times.duration, frames_indices=list(times.of_frames)
        )
        given = {"videos": [self._bounded(video.frames)], "video_metadata": [metadata], "do_sample_frames": False}
        given["return_metadata"] = True  # some processors spell a video by it and do not ask for it themselves
        return spelled(self.processor, self.alone, self.tokens, **given)

    def _bounded(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W), scaled down where a frame has too many pixels; its sides keep their ratio."""
        height, width = frames.shape[-2:]
        if not 0 < self.max_pixels < height * width:
            return frames
        share = math.sqrt(self.max_pixels / (height * width))
        size = [max(1, int(side * share)) for side in (height, width)]
        return torchvision_functions.resize(frames, size, torchvision_functions.InterpolationMode.BICUBIC)


def read_video_processor(name: str, where: str, config: PretrainedConfig) -> Any:
    """The video processor of `name`; None where transformers has none for its family.

    Raises:
        BadInput: if it cannot be read.
    """
    try:
        settings, class_name = _settings(name, where, config)
        return None if class_name is None else torchvision_functions.processor_class(*class_name)(**settings)
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = tower_loading.first_line(error)
        raise BadInput(
            f"{where}: cannot read the video processor of {name!r} ({reason}). Its directory needs "
            "video_preprocessor_config.json or preprocessor_config.json; or set backbone.videos: images."
        ) from error


def has_video_processor(name: str, where: str, config: PretrainedConfig) -> bool:
    """Whether transformers has one for `name`."""
    try:
        return _settings(name, where, config)[1] is not None
    except (OSError, ValueError):
        return False


def _settings(name: str, where: str, config: PretrainedConfig) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """The checkpoint's settings of its video processor, and the class. Raises OSError."""
    place = tower_loading.locate(name, where)
    settings = video_processing_utils.BaseVideoProcessor.get_video_processor_dict(place)[0]
    return settings, _class_of(settings.get("video_processor_type"), config)


def _class_of(named: str | None, config: PretrainedConfig) -> tuple[str, str] | None:
    """Module and name of a class of video processors: the one that a checkpoint names, or that of its family."""
    family, wanted = config.model_type, named or _of_families().get(config.model_type)
    if wanted is not None:
        module = torchvision_functions.module_of(wanted, "video")
        return (module, wanted) if module else None
    if not Path(transformers.__file__).with_name("models").joinpath(family, f"video_processing_{family}.py").is_file():
        return None
    module = f"transformers.models.{family}.video_processing_{family}"
    exported = torchvision_functions.imported(module).__all__
    return module, next(name for name in exported if name.endswith("VideoProcessor"))


@functools.cache
def _of_families() -> dict[str, str]:
    """Families that use the video processor of another one. transformers forgets them where torchvision is missing."""
    spec = importlib.util.find_spec("transformers.models.auto.video_processing_auto")
    module = importlib.util.module_from_spec(spec)
    empty = type(auto_mappings.VIDEO_PROCESSOR_MAPPING_NAMES)()
    with mock.patch.object(auto_mappings, "VIDEO_PROCESSOR_MAPPING_NAMES", empty), torchvision_functions.standing_in():
        spec.loader.exec_module(module)
    return {family: names["torchvision"] for family, names in module.VIDEO_PROCESSOR_MAPPING_NAMES.items()}


def spells_videos(stock: type) -> bool:
    """Whether a class of processors says how a video is spelled in the text."""
    return stock.replace_video_token is not ProcessorMixin.replace_video_token
