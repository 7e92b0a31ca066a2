"""Zero-shot classification by class texts, as a method among the others (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import Remembered, cosine_logits, unit_ensemble
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.zero_shot.options import ZeroShotOptions
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.feature_site import Features, Scores


@dataclass
class ZeroShotConfig(ZeroShotOptions, HeadConfig):
    """ZeroShotOptions as a peft config."""


class ZeroShotHead(Head):
    """logits = tau u(z) u(T)^T."""

    needs = ("text",)

    def __init__(self, config: ZeroShotConfig, base: object):
        super().__init__(config, base)
        self._once = Remembered()

    @property
    def text(self) -> Tensor:
        """(C, D), of unit length where the ensemble is of unit vectors."""
        if self.config.ensemble is None:
            return at_least_float32(self.base.class_text)
        make = unit_ensemble if self.config.ensemble == "unit" else lambda texts: texts.mean(1)
        return self._once.get("text", lambda texts: make(at_least_float32(texts)), self.bank.positive)

    def forward(self, features: Features) -> Scores:
        if self.config.ensemble is None:
            return self.base(features)
        return Scores(cosine_logits(features.image, self.text, self.logit_scale))

    def export(self) -> dict[str, Tensor]:
        """`text` (C, D) and `scale`: logits = scale u(z) u(text)^T."""
        text = self.text
        return {"text": text, "scale": text.new_tensor(self.logit_scale)}


class ZeroShotTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "zero_shot_"
    head_class = ZeroShotHead


class ZeroShotMethod(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = ZeroShotOptions
    Config = ZeroShotConfig
    Tuner = ZeroShotTuner


ENTRY = ZeroShotMethod
