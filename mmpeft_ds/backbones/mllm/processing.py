"""Images and videos through a checkpoint's own processor: tensors for the model, and how they are spelled in the text.

The processor's parts are read one by one: as a whole it would ask for packages that only videos or sound need.
"""

# R runs of tokens in the spelling of one image or video

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, ImageProcessingMixin, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.mllm import torchvision_functions
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.options import ImageBackend
from mmpeft_ds.data.batch import Spelled
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput

# Entry of the tensors of an image or a video: (1, R) lengths of the runs of its tokens in its spelling.
TOKEN_RUNS = "token_runs"
# What a processor gives besides the arguments of the vision tower.
OF_TEXTS = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "labels",
    "text_replacement_offsets",
}


@dataclass(frozen=True)
class PixelTransform(ImageTransform):
    """uint8 (3, H, W) -> output of the family's image processor, still uint8: normalising comes on the device.

    Patches of several frames, which of an image are all the same, come as one frame.

    Attributes:
        processor: the image processor, which resizes, crops and cuts into tiles or patches.
        min_size: (height, width) that a decoder at reduced scale must not go below; None: the full image is needed.
    """

    processor: Any
    min_size: tuple[int, int] | None = None

    def __call__(self, image: Tensor, generator: Any = None) -> dict[str, Tensor]:
        out = self.processor(
            images=[image.numpy()],
            do_rescale=False,
            do_normalize=False,
            input_data_format="channels_first",
            return_tensors="pt",
            **({"temporal_patch_size": 1} if hasattr(self.processor, "temporal_patch_size") else {}),
        )
        tensors = {name: out[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in out}
        tensors["pixel_values"] = whole_numbers(tensors["pixel_values"])
        return tensors


@dataclass(frozen=True)
class SpelledTransform(ImageTransform):
    """uint8 (3, H, W) -> what the whole processor makes of the image, and how the text spells it.

    Attributes:
        processor: the whole processor.
        alone: a text with one image and nothing else.
        tokens: of which each stands for one feature.
        patches: `processor` does not normalise; its patches of several frames, which of an image are all the same,
            become uint8 patches of one frame.
    """

    processor: Any
    alone: str
    tokens: tuple[str, ...]
    patches: bool = False
    min_size: None = None

    def __call__(self, image: Tensor, generator: Any = None) -> Spelled:
        made = spelled(self.processor, self.alone, self.tokens, images=[self.picture(image)])
        if self.patches:
            pixels, frames = made["pixel_values"], getattr(self.processor.image_processor, "temporal_patch_size", 1)
            if pixels.dim() == 2 and frames > 1:
                pixels = pixels.unflatten(1, (3, frames, -1))[:, :, 0].flatten(1)
            made["pixel_values"] = whole_numbers(pixels)
        return made

    @staticmethod
    def picture(image: Tensor) -> Image.Image:
        """The image as processors take it."""
        return Image.fromarray(image.permute(1, 2, 0).numpy())


def whole_numbers(pixels: Tensor) -> Tensor:
    """The same pixels as uint8.

    Raises:
        ValueError: if one of them is no whole number from 0 to 255.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.to(torch.uint8)
    if not torch.equal(whole.to(pixels.dtype), pixels):
        raise ValueError("an image processor that does not normalise gave pixels that are no whole numbers up to 255")
    return whole


def not_normalising(processor: Any) -> Any:
    """A copy of a whole processor that leaves the pixels of images as they are after scaling and cutting."""
    changed, images = copy.copy(processor), copy.copy(processor.image_processor)
    images.do_rescale = images.do_normalize = False
    changed.image_processor = images
    return changed


def spelled(processor: Any, alone: str, tokens: tuple[str, ...], **media: Any) -> Spelled:
    """The processor's text for one image or video, which is all that the text `alone` holds."""
    out = processor(text=[alone], return_text_replacement_offsets=True, return_tensors="pt", **media)
    ((replaced,),) = out["text_replacement_offsets"]
    spelling, runs = _shortened(replaced["replacement"], tokens)
    tensors = {n: torch.as_tensor(v) for n, v in out.items() if n not in OF_TEXTS and _is_numbers(v)}
    return Spelled({**tensors, TOKEN_RUNS: torch.tensor([runs])}, spelling)


def _is_numbers(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, int | float) or _is_numbers(v) for v in value)
    return isinstance(value, Tensor | tuple) and (isinstance(value, Tensor) or _is_numbers([*value]))


def _shortened(spelling: str, tokens: tuple[str, ...]) -> tuple[str, list[int]]:
    """`spelling` with each run of a token as one, and the lengths of the runs."""
    run = re.compile("|".join(f"(?:{re.escape(token)})+" for token in tokens))
    runs = [(found[0], next(t for t in tokens if found[0].startswith(t))) for found in run.finditer(spelling)]
    ones = iter([token for _, token in runs])
    return run.sub(lambda _: next(ones), spelling), [len(text) // len(token) for text, token in runs]


def read_image_processor(name: str, where: str, max_pixels: int, backend: ImageBackend) -> Any:
    """The image processor of `name`, which gives the same pixels whether or not torchvision is installed.

    Args:
        max_pixels: larger images are scaled down to this many; 0 = as the checkpoint says.
        backend: the library that scales, as transformers names it; where a family has one form alone, that one.

    Raises:
        BadInput: if it cannot be read, or does not keep the pixels of an image between two bounds.
    """
    place = tower_loading.locate(name, where)
    try:
        processor = _image_processor(place, {})
        if max_pixels:
            size = dict(processor.size or {})
            if not (size.get("shortest_edge") and size.get("longest_edge") and hasattr(processor, "merge_size")):
                raise BadInput(f"backbone.max_pixels: {name!r} sees images at sizes of its own. Leave it 0.")
            least = min(processor.size["shortest_edge"], max_pixels)
            # Where the checkpoint's file has the last two, as those on the hub do, they win over `size`.
            bounds = {"shortest_edge": least, "longest_edge": max_pixels}
            processor = _image_processor(place, {"size": bounds, "min_pixels": least, "max_pixels": max_pixels})
        return _on_tensors(processor) if backend == "torchvision" else processor
    except (OSError, ValueError, ImportError) as error:
        reason = tower_loading.first_line(error)
        raise BadInput(
            f"{where}: cannot read the image processor of {name!r} ({reason}). "
            "Its directory needs preprocessor_config.json."
        ) from error


def _image_processor(place: str, changes: dict[str, Any]) -> Any:
    """The image processor in its Pillow form, or in the one that works on tensors where it has no other.

    Raises:
        OSError, ValueError, ImportError: if it cannot be read.
    """
    try:
        return AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False, **changes)
    except (ValueError, ImportError):
        settings = ImageProcessingMixin.get_image_processor_dict(place)[0] | changes
        name = settings.pop("image_processor_type", "").removesuffix("Fast")
        module = torchvision_functions.module_of(name, "image")
        if module is None or torchvision_functions.module_of(f"{name}Pil", "image"):
            raise
        return torchvision_functions.processor_class(module, name)(**settings)


def _on_tensors(processor: Any) -> Any:
    """The same image processor in the form that works on tensors; as it is where its family has no such form, or that
    form would scale otherwise."""
    pil = type(processor)
    module = pil.__module__.replace("image_processing_pil_", "image_processing_")
    lanczos = getattr(processor, "resample", None) == Image.Resampling.LANCZOS
    if lanczos and not torchvision_functions.scales_by_lanczos():
        return processor
    if not pil.__name__.endswith("Pil") or importlib.util.find_spec(module) is None:
        return processor
    settings = {k: v for k, v in processor.to_dict().items() if k != "image_processor_type"}
    return torchvision_functions.processor_class(module, pil.__name__.removesuffix("Pil"))(**settings)


def read_processor(
    name: str,
    where: str,
    config: PretrainedConfig,
    family: Family,
    image_processor: Any,
    tokenizer: Any,
    video_processor: Any = None,
) -> Any:
    """The whole processor of `name`, with its parts for images, texts, and videos if it is given, alone.

    Raises:
        BadInput: if its class cannot say how images are spelled, or it cannot be made.
    """
    kind, stock, settings = processor_class(name, config, family, where)
    if stock is None or not _spells(stock):
        raise BadInput(
            f"{where}: {name!r} is of family {config.model_type!r}, and "
            + (f"its processor {kind} does not say" if kind else "transformers has no processor that says")
            + " how an image is spelled in the text (`replace_image_token`)."
        )
    known = inspect.signature(stock.__init__).parameters
    settings = {**family.processor_settings(config), **settings}
    parts = dict.fromkeys(stock.get_attributes())
    parts |= {"image_processor": image_processor, "tokenizer": tokenizer}
    if video_processor is not None:
        parts["video_processor"] = video_processor
    try:
        return _without_others(stock)(**parts, **{n: v for n, v in settings.items() if n in known and n not in parts})
    except (TypeError, ValueError, AttributeError, ImportError, KeyError) as error:
        reason = tower_loading.first_line(error)
        raise BadInput(f"{where}: cannot make the processor {kind} of {name!r} ({reason}).") from error


def processor_class(
    name: str, config: PretrainedConfig, family: Family, where: str = ""
) -> tuple[str | None, type | None, dict[str, Any]]:
    """Name and class of the processor of `name`, None where there is none, and its settings."""
    place = tower_loading.locate(name, where)
    try:
        settings = transformers.ProcessorMixin.get_processor_dict(place)[0]
    except OSError:
        settings = {}
    kind = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    return kind, family.processor or (getattr(transformers, kind, None) if kind else None), settings


class _OfImagesAndTexts:
    """Mixin before a processor class, which then does without its parts for videos and sound."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept that a part is missing, and the video processor, which transformers refuses without torchvision."""
        if argument is None or argument_name == "video_processor":
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    def __reduce__(self) -> Any:
        # The class is made at run time; loader processes make it for themselves.
        return _empty, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _without_others(stock: type) -> type:
    return type(stock.__name__, (_OfImagesAndTexts, stock), {"__module__": __name__})


def _empty(stock: type) -> Any:
    made = _without_others(stock)
    return made.__new__(made)


def _spells(stock: type) -> bool:
    try:
        return stock.replace_image_token is not transformers.ProcessorMixin.replace_image_token
    except ImportError:  # what stands for a class whose packages are missing
        return False
