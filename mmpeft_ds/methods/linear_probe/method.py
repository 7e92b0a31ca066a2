"""Linear probe: logistic regression on image features, as CoOp's few-shot tables have it (Zhou et al., IJCV 2022,
arXiv 2109.01134; Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.linear_probe.options import LinearProbeOptions
from mmpeft_ds.ops.logistic import logistic_regression, search_strength
from mmpeft_ds.sites.feature_site import Features, Labelled, Scores


@dataclass
class LinearProbeConfig(LinearProbeOptions, HeadConfig):
    """LinearProbeOptions as a peft config."""


class LinearProbeHead(Head):
    """logits = z W^T + b on features as they are; W and b are zero at first. It reads nothing of the bank."""

    def __init__(self, config: LinearProbeConfig, base: object):
        super().__init__(config, base)
        widths = {"text": base.text_width, "image": base.image_width}
        read = widths if config.inputs == "both" else {config.inputs: widths[config.inputs]}
        if missing := [name for name, width in read.items() if not width]:
            raise BadInput(f"linear_probe: inputs: {config.inputs} needs {missing[0]} features, which are not there.")
        weight, bias = torch.zeros(self.bank.num_classes, sum(read.values())), torch.zeros(self.bank.num_classes)
        if config.gradient_free:
            self.calibrated = ("weight", "bias")
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
        else:
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    @property
    def calibrates(self) -> bool:
        return self.config.gradient_free

    def rows(self, features: Features) -> Tensor:
        """(B, D) what it reads, text before image."""
        if self.config.inputs == "image":
            return features.image
        if features.text is None:
            raise BadInput("linear_probe: inputs: these samples bring no captions. Set task.text: captions.")
        return features.text if self.config.inputs == "text" else torch.cat([features.text, features.image], 1)

    def forward(self, features: Features) -> Scores:
        return Scores(nn.functional.linear(self.rows(features).to(self.weight.dtype), self.weight, self.bias))

    def calibrate(self, train: Labelled, validation: Labelled | None) -> dict[str, float]:
        """Solve for W and b on the training rows, with the C that is right most often on validation.

        Raises:
            BadInput: if C has to be searched and there is no validation split, or no row to fit.
        """
        if not self.calibrates:
            return {}
        x, y = self.rows(train.features)[train.features.valid], train.labels[train.features.valid]
        if not len(y):
            raise BadInput("linear_probe: there is no training row to fit. See data.sources.")

        @cache
        def solved(strength: float) -> tuple[Tensor, Tensor]:
            return logistic_regression(x, y, self.bank.num_classes, strength, self.config.max_iter)

        strength, searched = self.config.strength, {}
        if strength is None:
            if validation is None:
                raise BadInput(
                    "linear_probe: C is searched on validation, and the recipe names none. Give data.validation, or "
                    "set method.strength."
                )
            rows = validation.features.valid
            held_out, labels = self.rows(validation.features)[rows].double(), validation.labels[rows]

            def accuracy(strength: float) -> float:
                weight, bias = solved(strength)
                return ((held_out @ weight.T + bias).argmax(1) == labels).double().mean().item()

            strength, searched["validation_accuracy"] = search_strength(accuracy, self.config.halvings)
        weight, bias = solved(strength)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        return {"strength": strength, **searched}

    def export(self) -> dict[str, Tensor]:
        """`weight` (C, D) and `bias` (C,): logits = z weight^T + bias, z as it is."""
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}


class LinearProbeTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "linear_probe_"
    head_class = LinearProbeHead


class LinearProbe(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = LinearProbeOptions
    Config = LinearProbeConfig
    Tuner = LinearProbeTuner
    tables = (".weight",)


ENTRY = LinearProbe
