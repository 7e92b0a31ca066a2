"""peft's LoRA layer around a Linear, with its forward as one function where it is plain arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn

from mmpeft_ds.methods.common.beside import is_cast, is_watched
from mmpeft_ds.ops.low_rank_linear import low_rank_linear
from mmpeft_ds.sites.base import AdapterLayer


class LoraLinear(lora.Linear, AdapterLayer):
    """peft's own layer; only the arithmetic of its forward in training differs, and that by rounding."""

    tokenwise = rowless = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Forward of peft's layer, in fewer passes."""
        name = self._plain(x) if not args and not kwargs else None
        if name is None:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank_linear(x, self.base_layer.weight, self.base_layer.bias, down, up, self.scaling[name])

    def _plain(self, x: Tensor) -> str | None:
        """Name of the one adapter that is added, if nothing but a frozen Linear and two factors of one dtype compute,
        and nobody, such as ZeRO-3, waits in a hook until one of them is called; while gradients are recorded."""
        if not torch.is_grad_enabled():
            return None  # an evaluated model gives bit for bit what its adapter gives with peft alone
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant:
            return None
        parts = (self.base_layer, self.lora_A[name], self.lora_B[name])
        dropout = self.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            return None
        for part in parts:
            if type(part) is not nn.Linear or part.weight.dtype != x.dtype or is_watched(part):
                return None
        frozen = not any(p.requires_grad for p in self.base_layer.parameters())
        whole = frozen and all(part.bias is None for part in parts[1:])
        return name if whole and not is_cast(x) else None


def use_one_function(model: PeftModel) -> None:
    """Make every LoRA layer around a Linear a `LoraLinear`."""
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
