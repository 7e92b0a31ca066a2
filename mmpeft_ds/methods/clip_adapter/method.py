"""CLIP-Adapter: a bottleneck on the image feature, mixed with it (Gao et al., arXiv 2110.04544, IJCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.clip_adapter.options import ClipAdapterOptions
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import Remembered, cosine_logits
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.feature_site import Features, Scores


@dataclass
class ClipAdapterConfig(ClipAdapterOptions, HeadConfig):
    """ClipAdapterOptions as a peft config."""


class ClipAdapterHead(Head):
    """f = ratio h + (1 - ratio) z with h = relu(up relu(down z)), z as it is; logits = tau u(f) u(T)^T."""

    needs = ("text",)

    def __init__(self, config: ClipAdapterConfig, base: object):
        super().__init__(config, base)
        width = base.image_width
        inner = width // config.reduction
        if inner < 1:
            raise BadInput(f"clip_adapter: reduction: {config.reduction} leaves nothing of {width} features.")
        dtype = at_least_float32(self.bank.positive).dtype
        self.down = nn.Linear(width, inner, bias=False, dtype=dtype)
        self.up = nn.Linear(inner, width, bias=False, dtype=dtype)
        self._once = Remembered()

    @property
    def text(self) -> Tensor:
        """(C, D), of unit length."""
        return self._once.get("text", lambda _: at_least_float32(self.base.class_text), self.bank.positive)

    def forward(self, features: Features) -> Scores:
        z, ratio = features.image.to(self.text.dtype), self.config.ratio
        h = torch.relu(self.up(torch.relu(self.down(z))))
        return Scores(cosine_logits(ratio * h + (1 - ratio) * z, self.text, self.logit_scale))

    def export(self) -> dict[str, Tensor]:
        """`down`, `up`, `ratio`, `text` and `scale` of the formulae above."""
        text = self.text
        return {
            "down": self.down.weight.detach(),
            "up": self.up.weight.detach(),
            "ratio": text.new_tensor(self.config.ratio),
            "text": text,
            "scale": text.new_tensor(self.logit_scale),
        }


class ClipAdapterTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "clip_adapter_"
    head_class = ClipAdapterHead


class ClipAdapter(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = ClipAdapterOptions
    Config = ClipAdapterConfig
    Tuner = ClipAdapterTuner


ENTRY = ClipAdapter
