"""Parameters without dimensions, such as CLIP's temperature, which DeepSpeed can neither broadcast nor partition."""

from __future__ import annotations

from torch import nn


class ScalarsAsBuffers:
    """Mixin before a frozen `nn.Module`: its own parameters without dimensions are buffers under the same names.

    A checkpoint loads and is saved as before; such a value cannot be trained.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a tensor without dimensions as a buffer, and every other one as usual."""
        if param is not None and param.dim() == 0:
            self.register_buffer(name, param.data)
        else:
            super().register_parameter(name, param)
