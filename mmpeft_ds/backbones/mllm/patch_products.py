"""Convolutions over single patches as matrix products.

Many vision towers get their images in patches and embed each with a convolution whose kernel is as large as the
patch, and some merge patches in the same way. This is a matrix product, which libraries compute several times as
fast: a convolution over thousands of tiny images is a case for which they were not made. The module stays the stock
one in all else: its parameters and their names, its hooks, what `isinstance` says of it.

Many families give patches of images as whole numbers, and one frame where all frames are alike. The embedding, which
may be a linear layer, then multiplies the whole numbers of a few patches at a time, while they are in the cache, by
the sum of the weights of all frames, in which the factors of standardising are.
"""

# N patches, C channels of a patch, F values of one channel in one frame, D width of its embedding

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mmpeft_ds.backbones.common.affine import Affine
from mmpeft_ds.backbones.common.stand_in import stand_in
from mmpeft_ds.backbones.mllm.costs import patch_side
from mmpeft_ds.ops.precision import full_dtype

CACHED = 2**20  # values that are normalised at a time on a CPU: 4 MiB of float32


class _Product:
    """Mixin before a module that embeds patches: a matrix product where each input is one patch."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *kernel) -> (N, D, 1, ...), of a linear layer (N, values) -> (N, D); of the patches in `_raw` where
        those are for this module. Other inputs go the usual way."""
        reader, pixels, normalise = _raw.get()
        if reader is self:
            product = self._of_whole_numbers(len(x), pixels, normalise)
        elif x.shape[2:] == getattr(self, "kernel_size", ()):
            product = functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        else:
            return super().forward(x)
        return product.view(*product.shape, *[1] * (x.dim() - 2))

    def _of_whole_numbers(self, given: int, pixels: Tensor, normalise: Affine) -> Tensor:
        """(N, D) for patches (N, C, F), a few at a time; `given` of them are in the input."""
        if given != len(pixels):
            raise RuntimeError(f"this tower embeds {given} of {len(pixels)} patches at a time; give it whole pixels")
        rows = CACHED // self.weight[0].numel() if pixels.device.type == "cpu" else len(pixels)
        parts = pixels.split(max(1, rows))
        # A half type holds the weights, but neither their sum over frames nor their products with the factors.
        folds = self.weight.element_size() >= 4
        product = self._folded(pixels.shape[1:], normalise) if folds else self._of_frames(normalise)
        return torch.cat([product(part) for part in parts])

    def _folded(self, shape: torch.Size, normalise: Affine) -> Callable[[Tensor], Tensor]:
        """The product of whole numbers (C, F): what standardises them is in the weight and the bias."""
        channels, values = shape
        weight_DCF = self.weight.reshape(len(self.weight), channels, -1, values).sum(2)
        factor, shift = normalise.terms(weight_DCF.device, weight_DCF.dtype, 3)
        bias = (weight_DCF * shift).sum((1, 2)) + (0 if self.bias is None else self.bias)
        weight = (weight_DCF * factor).flatten(1)
        return lambda pixels: functional.linear(pixels.flatten(1).to(weight.dtype), weight, bias)

    def _of_frames(self, normalise: Affine) -> Callable[[Tensor], Tensor]:
        """The product of standardised pixels, of all frames."""
        weight = self.weight.flatten(1)
        return lambda pixels: functional.linear(
            _standardised(pixels, normalise, weight.shape[1], weight.dtype), weight, self.bias
        )


class PatchConv2d(_Product, nn.Conv2d):
    """A `Conv2d` that multiplies single patches."""


class PatchConv3d(_Product, nn.Conv3d):
    """A `Conv3d` that multiplies single patches."""


class PatchLinear(_Product, nn.Linear):
    """A `Linear` that reads patches of whole numbers too."""


# A module, the uint8 patches (N, C, F) that it reads in place of its input, one frame of each for all of its frames,
# and what standardises them. Not an attribute of the module, which other threads may call.
_raw: ContextVar[tuple[_Product, Tensor, Affine] | tuple[None, None, None]] = ContextVar(
    "mmpeft_ds_raw_pixels", default=(None, None, None)
)

_CLASSES: dict[type, Any] = {nn.Conv2d: PatchConv2d, nn.Conv3d: PatchConv3d}


def used(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, each of whose convolutions that is one product of a patch multiplies single patches.

    Those are convolutions with kernels as large as their strides, without padding, dilation, or groups. Convolutions
    over whole images are not concerned: they would have to be cut into patches first, which takes what it saves.
    """
    for module in model.modules():
        if type(module) in _CLASSES and _is_patchwise(module):
            module.__class__ = _CLASSES[type(module)]
    return model


def _is_patchwise(convolution: Any) -> bool:
    unpadded = convolution.padding == "valid" or not any(convolution.padding)
    plain = convolution.groups == 1 and set(convolution.dilation) == {1}
    return unpadded and plain and convolution.kernel_size == convolution.stride


@dataclass(frozen=True)
class RawPixels:
    """How a model reads `pixel_values` that come as whole numbers.

    Attributes:
        normalise: standardises them over their channels.
        embedding: path of the module that embeds single patches; empty where there is no such one.
        values: of one patch, all frames, as the tower reads it.
    """

    normalise: Affine
    embedding: str = ""
    values: int = 0

    @staticmethod
    def of(model: PreTrainedModel, normalise: Affine) -> RawPixels:
        """Those of a model without adapters."""
        vision = getattr(model.config, "vision_config", None)
        tower, frame = model.get_encoder(modality="image"), 3 * patch_side(vision) ** 2
        prefix = next(path for path, module in model.named_modules() if module is tower)
        found = [(path, m) for path, m in tower.named_modules(prefix=prefix) if _embeds(path, m, frame)]
        if len(found) != 1:
            return RawPixels(normalise, values=frame * getattr(vision, "temporal_patch_size", 1))
        ((path, module),) = found
        if type(module) is nn.Linear:
            module.__class__ = PatchLinear
            return RawPixels(normalise, path, module.in_features)
        return RawPixels(normalise, path, module.in_channels * math.prod(module.kernel_size))

    @contextlib.contextmanager
    def read_by(self, model: PreTrainedModel, media: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Context in which the model reads the pixels; gives what its vision tower is called with.

        Single patches, flat or not, are read by their embedding itself, and the tower is called with a stand-in of
        their shape. Other pixels, or those of a tower whose embedding has adapters, are standardised before the call.

        Args:
            media: arguments of the tower; `pixel_values` in floating point are left as they are.
        """
        pixels = media.get("pixel_values")
        if pixels is None or pixels.is_floating_point():
            yield media
            return
        flat = pixels.dim() == 2
        if not flat and pixels[0].numel() != self.values:
            yield media | {"pixel_values": self.normalise(pixels).to(model.dtype)}
            return
        pixels_NCF = pixels.unflatten(1, (3, -1)) if flat else pixels.flatten(2)
        shape = (len(pixels), self.values) if flat else tuple(pixels.shape)
        embedding = model.get_submodule(self.embedding)
        if not isinstance(embedding, _Product):  # an adapter stands in its place
            whole = _standardised(pixels_NCF, self.normalise, self.values, model.dtype)
            yield media | {"pixel_values": whole.view(shape)}
            return
        token = _raw.set((embedding, pixels_NCF, self.normalise))
        try:
            yield media | {"pixel_values": stand_in(pixels, shape, model.dtype)}
        finally:
            _raw.reset(token)


def _embeds(path: str, module: nn.Module, values: int) -> bool:
    """Whether a module of a vision tower embeds patches; a linear layer those of so many values a frame."""
    if isinstance(module, (PatchConv2d, PatchConv3d)):
        return module.in_channels == 3
    return type(module) is nn.Linear and "patch_embed" in path and module.in_features % values == 0


def _standardised(pixels_NCF: Tensor, normalise: Affine, values: int, dtype: torch.dtype) -> Tensor:
    """(N, values), one frame of each patch for as many as these are."""
    frames = values // pixels_NCF[0].numel()
    return normalise(pixels_NCF.to(full_dtype(dtype))).to(dtype)[:, :, None].expand(-1, -1, frames, -1).flatten(1)
