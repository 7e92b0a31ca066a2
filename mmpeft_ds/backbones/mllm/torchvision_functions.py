"""The torchvision functions that transformers' image and video processors call, for machines without torchvision.

The processors need a few functions on tensors, and cannot be imported without torchvision. Many installations of a CPU
wheel of torch lack it, since its wheel on PyPI is built for CUDA. Where torchvision is installed nothing of this is
used; a test then compares both.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
import transformers.utils
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.functional import pad as padded
from transformers import image_processing_backends, image_utils, video_processing_utils

MODULES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


class InterpolationMode(enum.Enum):
    """Names and values of torchvision's own."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


SMOOTH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC, InterpolationMode.LANCZOS)


def resize(
    image: Tensor,
    size: Sequence[int],
    interpolation: InterpolationMode = InterpolationMode.BILINEAR,
    antialias: bool = True,
) -> Tensor:
    """(..., C, H, W) at another (height, width), in its dtype."""
    if tuple(image.shape[-2:]) == tuple(size) or not image.numel():
        return image
    interpolation = _by_pillow().get(interpolation, interpolation)
    smooth = interpolation in SMOOTH
    flat = image.reshape(-1, *image.shape[-3:])
    # Bytes are scaled as they are where torch has a fast kernel for them, which rounds otherwise than floats do.
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    as_is = image.is_floating_point() or (
        image.dtype == torch.uint8 and image.device.type == "cpu" and (interpolation != SMOOTH[0] or vectorised)
    )
    scaled = interpolate(
        flat if as_is else flat.float(),
        size=tuple(size),
        mode=interpolation.value,
        align_corners=False if smooth else None,
        antialias=antialias and smooth,
    )
    if not as_is:
        scaled = (scaled.clamp(0, 255) if image.dtype == torch.uint8 else scaled).round().to(image.dtype)
    return scaled.reshape(*image.shape[:-2], *scaled.shape[-2:])


@functools.cache
def scales_by_lanczos() -> bool:
    """Whether torch scales by LANCZOS. An older one does not, nor does the torchvision that belongs to it, for which
    transformers takes BICUBIC."""
    try:
        interpolate(torch.zeros(1, 1, 4, 4), size=(2, 2), mode="lanczos", align_corners=False, antialias=True)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True


def pad(
    image: Tensor, padding: Sequence[int], fill: float | Sequence[float] = 0, padding_mode: str = "constant"
) -> Tensor:
    """With `padding` (left, top, right, bottom) around; `fill` is one value, or one for each channel."""
    left, top, right, bottom = padding
    around = (left, right, top, bottom)
    if not isinstance(fill, Sequence):
        return padded(image, around, mode=padding_mode, value=fill or 0)
    channels = image.shape[-3]
    values = fill if len(fill) == channels else [*fill] * channels
    pairs = zip(image.split(1, -3), values, strict=True)
    return torch.cat([padded(channel, around, mode=padding_mode, value=value) for channel, value in pairs], -3)


def crop(image: Tensor, top: int, left: int, height: int, width: int) -> Tensor:
    """A part of an image that lies inside it."""
    return image[..., top : top + height, left : left + width]


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    """(image - mean) / std, by channel."""
    mean, std = (torch.as_tensor(v, dtype=image.dtype, device=image.device).reshape(-1, 1, 1) for v in (mean, std))
    return (image.sub_(mean) if inplace else image - mean).div_(std)


def grayscale_to_rgb(image: Tensor) -> Tensor:
    """With three channels in place of one."""
    return image if image.shape[-3] >= 3 else image.repeat_interleave(3, dim=-3)


def to_dtype(image: Tensor, dtype: torch.dtype, scale: bool = False) -> Tensor:
    """Bytes as floats in [0, 1], or back."""
    if image.dtype == dtype or not scale or image.is_floating_point() == dtype.is_floating_point:
        return image.to(dtype)
    return image.to(dtype) / 255 if dtype.is_floating_point else (image * 255.999).to(dtype)


def pil_to_tensor(picture: Image.Image) -> Tensor:
    """uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(picture))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def to_pil_image(image: Tensor) -> Image.Image:
    """A picture of uint8 (C, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def is_missing() -> bool:
    """Whether torchvision is not installed."""
    return importlib.util.find_spec("torchvision") is None


def imported(name: str) -> types.ModuleType:
    """A module of transformers that needs torchvision, as it is, or with what stands here in its place."""
    if not is_missing():
        return importlib.import_module(name)
    _complete(image_processing_backends, video_processing_utils)
    with standing_in():
        module = importlib.import_module(name)
    return module


@functools.cache  # hundreds of folders are looked through
def module_of(name: str, medium: str) -> str | None:
    """The module of transformers that has this class of processors, for `image` or `video`; None if there is none."""
    for path in sorted(Path(transformers.__file__).parent.glob(f"models/*/{medium}_processing_*.py")):
        if f"class {name}(" in path.read_text():
            return f"transformers.models.{path.parent.name}.{path.stem}"
    return None


class _Reduced:
    """Mixin before a class of processors, whose module other processes have to import as this one did."""

    def __reduce__(self) -> Any:
        stock = type(self).__bases__[1]
        return _empty, (stock.__module__, stock.__name__), self.__dict__


@functools.cache
def processor_class(module: str, name: str) -> type:
    """A class of image or video processors out of a module of transformers that needs torchvision."""
    stock = getattr(imported(module), name)
    return type(name, (_Reduced, stock), {"__module__": __name__})


def _empty(module: str, name: str) -> Any:
    made = processor_class(module, name)
    return made.__new__(made)


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """For imports of modules that import torchvision or ask for it; afterwards it is missing again."""
    if not is_missing():
        yield
        return
    here = sys.modules[__name__]
    made = {name: types.ModuleType(name) for name in MODULES}
    for name, module in made.items():
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__dict__.update(functional=here, InterpolationMode=InterpolationMode)
    made |= {f"{name}.functional": here for name in MODULES[1:]}
    there = {"is_torchvision_available": lambda: True, "is_torchvision_v2_available": lambda: True}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, made))
        for module in (transformers.utils, transformers.utils.import_utils):
            stack.enter_context(mock.patch.multiple(module, **there))
        yield


def _complete(*modules: types.ModuleType) -> None:
    """Give modules that were imported without torchvision the names that they take from it."""
    names = {
        "tvF": sys.modules[__name__],
        "pil_torch_interpolation_mapping": _by_pillow(),
        "torch_pil_interpolation_mapping": {mode: number for number, mode in _by_pillow().items()},
        "is_torchvision_greater_or_equal": lambda version: scales_by_lanczos(),  # for which it is asked
    }
    for module in (*modules, image_utils):
        for name, value in names.items():
            if not getattr(module, name, None) or name.startswith("is_"):
                setattr(module, name, value)


@functools.cache
def _by_pillow() -> dict[int, InterpolationMode]:
    """Pillow's number of each mode."""
    shared = (mode for mode in Image.Resampling if mode.name in InterpolationMode.__members__)
    return {mode: InterpolationMode[mode.name] for mode in shared} | {
        Image.Resampling.NEAREST: InterpolationMode.NEAREST_EXACT
    }
