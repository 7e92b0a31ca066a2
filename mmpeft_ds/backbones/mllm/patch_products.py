"""Convolutions over single patches as matrix products.

Many vision towers get their images in patches and embed each with a convolution whose kernel is as large as the
patch, and some merge patches in the same way. This is a matrix product, which libraries compute several times as
fast: a convolution over thousands of tiny images is a case for which they were not made. The module stays the stock
one in all else: its parameters and their names, its hooks, what `isinstance` says of it.

Some families give patches of images as whole numbers, and one frame where all frames are alike. The embedding then
multiplies the whole numbers of a few patches at a time, while they are in the cache, by the sum of the weights of all
frames, in which the factors of standardising are.
"""

# N patches, C channels of a patch, F values of one channel in one frame, D width of its embedding

from __future__ import annotations

import contextlib
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
from mmpeft_ds.ops.precision import full_dtype

CACHED = 2**20  # values that are normalised at a time on a CPU: 4 MiB of float32


class _Product:
    """Mixin before a convolution: a matrix product where the input is as large as the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *kernel) -> (N, D, 1, ...); an input of another size is convolved."""
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)
        product = functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return product.view(*product.shape, *[1] * len(self.kernel_size))


class PatchConv2d(_Product, nn.Conv2d):
    """A `Conv2d` that multiplies single patches."""


class PatchConv3d(_Product, nn.Conv3d):
    """A `Conv3d` that multiplies single patches."""

    def forward(self, x: Tensor) -> Tensor:
        """As of `_Product`; of the patches in `_raw` where those are for this module."""
        reader, pixels, normalise = _raw.get()
        if reader is not self:
            return super().forward(x)
        if len(x) != len(pixels):
            raise RuntimeError(f"this tower embeds {len(x)} of {len(pixels)} patches at a time; give it whole pixels")
        rows = CACHED // self.weight[0].numel() if pixels.device.type == "cpu" else len(pixels)
        parts = pixels.split(max(1, rows))
        # A half type holds the weights, but neither their sum over frames nor their products with the factors.
        product = self._folded(normalise) if self.weight.element_size() >= 4 else self._of_frames(normalise)
        return torch.cat([product(part) for part in parts]).view(-1, self.out_channels, *[1] * 3)

    def _folded(self, normalise: Affine) -> Callable[[Tensor], Tensor]:
        """The product of whole numbers: what standardises them is in the weight and the bias."""
        weight_DCF = self.weight.sum(2).flatten(2)
        factor, shift = normalise.terms(weight_DCF.device, weight_DCF.dtype, 3)
        bias = (weight_DCF * shift).sum((1, 2)) + (0 if self.bias is None else self.bias)
        weight = (weight_DCF * factor).flatten(1)
        return lambda pixels: functional.linear(pixels.flatten(1).to(weight.dtype), weight, bias)

    def _of_frames(self, normalise: Affine) -> Callable[[Tensor], Tensor]:
        """The product of standardised pixels, of all frames."""
        weight, frames = self.weight.flatten(1), self.kernel_size[0]
        return lambda pixels: functional.linear(
            _standardised(pixels, normalise, frames, weight.dtype), weight, self.bias
        )


# A module, the uint8 patches (N, C, F) that it reads in place of its input, one frame of each for all of its frames,
# and what standardises them. Not an attribute of the module, which other threads may call.
_raw: ContextVar[tuple[PatchConv3d, Tensor, Affine] | tuple[None, None, None]] = ContextVar(
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
        frames: that each flat patch stands for.
        embedding: path of the convolution that embeds flat patches; empty where there is no such one.
    """

    normalise: Affine
    frames: int
    embedding: str

    @staticmethod
    def of(model: PreTrainedModel, normalise: Affine) -> RawPixels:
        """Those of a model without adapters."""
        frames = getattr(getattr(model.config, "vision_config", None), "temporal_patch_size", 1)
        paths = [path for path, m in model.named_modules() if isinstance(m, PatchConv3d) and m.in_channels == 3]
        return RawPixels(normalise, frames, paths[0] if len(paths) == 1 else "")

    @contextlib.contextmanager
    def read_by(self, model: PreTrainedModel, media: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Context in which the model reads the pixels; gives what its vision tower is called with.

        Flat patches are read by their embedding itself, and the tower is called with a stand-in of their shape. Other
        pixels, or those of a tower whose embedding has adapters, are standardised before the call.

        Args:
            media: arguments of the tower; `pixel_values` in floating point are left as they are.
        """
        pixels = media.get("pixel_values")
        if pixels is None or pixels.is_floating_point():
            yield media
            return
        if pixels.dim() != 2:
            yield media | {"pixel_values": self.normalise(pixels).to(model.dtype)}
            return
        pixels_NCF = pixels.unflatten(1, (3, -1))
        embedding = model.get_submodule(self.embedding)
        if not isinstance(embedding, PatchConv3d):  # an adapter stands in its place
            yield media | {"pixel_values": _standardised(pixels_NCF, self.normalise, self.frames, model.dtype)}
            return
        nothing = stand_in(pixels, (len(pixels), pixels.shape[1] * self.frames), model.dtype)
        token = _raw.set((embedding, pixels_NCF, self.normalise))
        try:
            yield media | {"pixel_values": nothing}
        finally:
            _raw.reset(token)


def _standardised(pixels_NCF: Tensor, normalise: Affine, frames: int, dtype: torch.dtype) -> Tensor:
    """(N, C * frames * F)"""
    return normalise(pixels_NCF.to(full_dtype(dtype))).to(dtype)[:, :, None].expand(-1, -1, frames, -1).flatten(1)
