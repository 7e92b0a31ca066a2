"""Images through a checkpoint's own processor: tensors for the model, and how an image is spelled in the text.

The processor's parts are read one by one: as a whole it would ask for packages that only videos or sound need.
"""

# R runs of image tokens in the spelling of one image

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.data.batch import SpelledImage
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.errors import BadInput

# Entry of an image's tensors: (1, R) lengths of the runs of image tokens in its spelling.
TOKEN_RUNS = "token_runs"
# What a processor gives besides the arguments of the vision tower.
_OF_TEXTS = {
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
        )
        tensors = {name: out[name] for name in ("pixel_values", "image_sizes", "image_grid_thw") if name in out}
        # Pillow has rounded to whole numbers, so nothing is lost.
        tensors["pixel_values"] = tensors["pixel_values"].to(torch.uint8)
        return tensors


@dataclass(frozen=True)
class SpelledTransform(ImageTransform):
    """uint8 (3, H, W) -> what the whole processor makes of the image, normalised, and how the text spells it.

    Attributes:
        processor: the whole processor.
        alone: a text with one image and nothing else.
        image_token: that stands for one feature.
    """

    processor: Any
    alone: str
    image_token: str
    min_size: None = None

    def __call__(self, image: Tensor, generator: Any = None) -> SpelledImage:
        out = self.processor(
            images=[Image.fromarray(image.permute(1, 2, 0).numpy())],
            text=[self.alone],
            return_text_replacement_offsets=True,
            return_tensors="pt",
        )
        ((replaced,),) = out["text_replacement_offsets"]
        spelling, runs = _shortened(replaced["replacement"], self.image_token)
        tensors = {n: v for n, v in out.items() if n not in _OF_TEXTS and isinstance(v, Tensor)}
        return SpelledImage({**tensors, TOKEN_RUNS: torch.tensor([runs])}, spelling)


def _shortened(spelling: str, image_token: str) -> tuple[str, list[int]]:
    """`spelling` with each run of image tokens as one, and the lengths of the runs."""
    run = re.compile(f"(?:{re.escape(image_token)})+")
    return run.sub(lambda _: image_token, spelling), [len(m) // len(image_token) for m in run.findall(spelling)]


def read_image_processor(name: str, where: str, max_pixels: int) -> Any:
    """The image processor of `name` in its Pillow form, which gives the same pixels whether or not torchvision is
    there; where a family has none, the one that it has.

    Args:
        max_pixels: larger images are scaled down to this many; 0 = as the checkpoint says.

    Raises:
        BadInput: if it cannot be read, or does not keep the pixels of an image between two bounds.
    """
    changes: dict[str, Any] = {}
    place = tower_loading.locate(name, where)
    try:
        processor = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False)
        if max_pixels:
            size = dict(processor.size or {})
            if not (size.get("shortest_edge") and size.get("longest_edge") and hasattr(processor, "merge_size")):
                raise BadInput(f"backbone.max_pixels: {name!r} sees images at sizes of its own. Leave it 0.")
            least = min(processor.size["shortest_edge"], max_pixels)
            changes["size"] = {"shortest_edge": least, "longest_edge": max_pixels}
            # Where the checkpoint's file has these keys, as those on the hub do, they win over `size`.
            changes |= {"min_pixels": least, "max_pixels": max_pixels}
            processor = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False, **changes)
    except (OSError, ValueError, ImportError) as error:
        reason = tower_loading.first_line(error)
        raise BadInput(
            f"{where}: cannot read the image processor of {name!r} ({reason}). "
            "Its directory needs preprocessor_config.json."
        ) from error
    return processor


def read_processor(
    name: str, where: str, config: PretrainedConfig, family: Family, image_processor: Any, tokenizer: Any
) -> Any:
    """The whole processor of `name`, with its parts for images and texts alone.

    Raises:
        BadInput: if its class cannot say how images are spelled, or it cannot be made.
    """
    place = tower_loading.locate(name, where)
    try:
        settings = transformers.ProcessorMixin.get_processor_dict(place)[0]
    except OSError:
        settings = {}
    kind = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    stock = family.processor or (getattr(transformers, kind, None) if kind else None)
    if stock is None or not _spells(stock):
        raise BadInput(
            f"{where}: {name!r} is of family {config.model_type!r}, and "
            + (f"its processor {kind} does not say" if kind else "transformers has no processor that says")
            + " how an image is spelled in the text (`replace_image_token`)."
        )
    known = inspect.signature(stock.__init__).parameters
    settings = {**family.processor_settings(config), **settings}
    parts = dict.fromkeys(stock.get_attributes()) | {"image_processor": image_processor, "tokenizer": tokenizer}
    try:
        return _without_others(stock)(**parts, **{n: v for n, v in settings.items() if n in known and n not in parts})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        reason = tower_loading.first_line(error)
        raise BadInput(f"{where}: cannot make the processor {kind} of {name!r} ({reason}).") from error


class _OfImagesAndTexts:
    """Mixin before a processor class, which then does without its parts for videos and sound."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept that a part is missing."""
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

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
