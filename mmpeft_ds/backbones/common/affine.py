"""Standardising by constants: pixels by the mean and deviation of a checkpoint, features by those of a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.backbones.common.model_hooks import HasFrozenConstants
from mmpeft_ds.ops.precision import full_dtype


class Affine(HasFrozenConstants, nn.Module):
    """(scale * x - mean) / std over one dimension, in at least float32.

    The statistics are constants of the configuration and not buffers: a buffer would be rounded to bfloat16 with the
    base, and is left empty by loaders that build on the meta device.

    Args:
        mean, std: one number per entry of the dimension.
        dim: which dimension of the input they belong to.
        scale: factor of the input, such as 1 / 255 for uint8 pixels.
    """

    def __init__(self, mean: list[float], std: list[float], dim: int, scale: float = 1.0):
        super().__init__()
        self.mean, self.std, self.dim, self.scale = list(mean), list(std), dim, scale
        self._ready: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        dtype = full_dtype(x.dtype)
        factor, shift = self.terms(x.device, dtype, x.dim())
        if x.dtype == dtype:
            return torch.addcmul(shift, x, factor)
        converted = x.to(dtype)
        return torch.addcmul(shift, converted, factor, out=converted)

    def terms(self, device: torch.device, dtype: torch.dtype, dims: int) -> tuple[Tensor, Tensor]:
        """Factor and shift of `x * factor + shift`, which spread over a tensor of `dims` dimensions."""
        key = (device, dtype, dims)
        if key not in self._ready:
            shape = [1] * dims
            shape[self.dim] = -1
            std = torch.tensor(self.std, dtype=torch.float64)
            mean = torch.tensor(self.mean, dtype=torch.float64)
            pair = (self.scale / std, -mean / std)
            self._ready[key] = tuple(t.view(shape).to(device, dtype) for t in pair)
        return self._ready[key]

    def arguments(self) -> dict[str, Any]:
        """What makes another of the same, as a configuration holds it."""
        return {"mean": self.mean, "std": self.std, "dim": self.dim, "scale": self.scale}

    def frozen_constants(self) -> dict[str, Tensor]:
        """Mean and deviation, which the fingerprint of the frozen base covers."""
        return {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("mean", "std")}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}
