"""TaskRes: a free residual on the class texts (Yu et al., CVPR 2023, arXiv 2211.10277)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import Remembered, cosine_logits
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.task_res.options import TaskResOptions
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.feature_site import Features, Scores


@dataclass
class TaskResConfig(TaskResOptions, HeadConfig):
    """TaskResOptions as a peft config."""


class TaskResHead(Head):
    """logits = tau u(z) u(T + alpha x)^T, T the raw mean over templates, x (C, D) trained."""

    needs = ("text",)

    def __init__(self, config: TaskResConfig, base: object):
        super().__init__(config, base)
        classes, _, width = self.bank.positive.shape
        positive = at_least_float32(self.bank.positive)
        self.residual = nn.Parameter(torch.zeros(classes, width, dtype=positive.dtype, device=positive.device))
        self._once = Remembered()

    @property
    def text(self) -> Tensor:
        """(C, D) class texts with their residuals, not of unit length."""
        frozen = self._once.get("text", lambda texts: at_least_float32(texts).mean(1), self.bank.positive)
        return frozen + self.config.alpha * self.residual

    def forward(self, features: Features) -> Scores:
        return Scores(cosine_logits(features.image, self.text, self.logit_scale))

    def export(self) -> dict[str, Tensor]:
        """`text` (C, D) and `scale`: logits = scale u(z) u(text)^T."""
        text = self.text.detach()
        return {"text": text, "scale": text.new_tensor(self.logit_scale)}


class TaskResTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "task_res_"
    head_class = TaskResHead


class TaskRes(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = TaskResOptions
    Config = TaskResConfig
    Tuner = TaskResTuner
    tables = (".residual",)


ENTRY = TaskRes
