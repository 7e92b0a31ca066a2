"""Convolutions over single patches as matrix products.

Many vision towers get their images in patches and embed each with a convolution whose kernel is as large as the
patch, and some merge patches in the same way. This is a matrix product, which libraries compute several times as
fast: a convolution over thousands of tiny images is a case for which they were not made. The module stays the stock
one in all else: its parameters and their names, its hooks, what `isinstance` says of it.
"""

# N patches, C channels of a patch, D width of its embedding

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel


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
