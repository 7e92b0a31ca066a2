"""Tip-Adapter and Tip-Adapter-F: a cache of labelled images votes beside the class texts (Zhang et al., ECCV 2022,
arXiv 2111.03930)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import Remembered, unit_ensemble
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.tip_adapter.options import TipAdapterOptions
from mmpeft_ds.ops import cache_affinity
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.feature_site import Features, Labelled, Scores


@dataclass
class TipAdapterConfig(TipAdapterOptions, HeadConfig):
    """TipAdapterOptions as a peft config."""


class TipAdapterHead(Head):
    """logits = tau u(z) T^T + alpha sum over cache rows of their class of exp(-beta (1 - u(z) key)).

    T is the ensemble of unit templates; keys are unit vectors, the mean over augmented passes of each support sample.
    Trained keys are not brought back to unit length, as in the published code. That code writes 100 for tau.
    """

    calibrated = ("alpha", "beta")

    def __init__(self, config: TipAdapterConfig, base: object):
        super().__init__(config, base)
        self._once = Remembered()
        support = at_least_float32(self.bank.support)
        if config.train_keys:
            self.keys = nn.Parameter(self._frozen_keys().clone())
        for name in self.calibrated:
            # in float64 the grid's values stay what they are
            value = torch.tensor(getattr(config, name), dtype=torch.float64, device=support.device)
            self.register_buffer(name, value)

    @classmethod
    def needed(cls, config: TipAdapterConfig) -> tuple[str, ...]:
        return ("text", "support") if config.text else ("support",)

    @property
    def calibrates(self) -> bool:
        return self.config.search

    def _frozen_keys(self) -> Tensor:
        return self._once.get(
            "keys", lambda _: normalize(at_least_float32(self.bank.cache), dim=-1), self.bank.support
        )

    def _parts(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) zero-shot logits, or zeros, and (M, B) products of keys and queries."""
        keys = self.keys if self.config.train_keys else self._frozen_keys()
        unit = normalize(image.to(keys.dtype), dim=-1)
        if self.config.text:
            text = self._once.get("text", lambda texts: unit_ensemble(at_least_float32(texts)), self.bank.positive)
            logits = self.logit_scale * unit @ text.to(keys.dtype).T
        else:
            logits = unit.new_zeros(len(unit), self.bank.num_classes)
        return logits, keys @ unit.T

    def forward(self, features: Features) -> Scores:
        logits, cosine = self._parts(features.image)
        alpha, beta = self.alpha.to(logits.dtype), self.beta.to(logits.dtype)
        votes = cache_affinity.votes(cosine, self.bank.support_labels, self.bank.num_classes, beta)
        return Scores(logits + alpha * votes)

    @torch.no_grad()
    def calibrate(self, train: Labelled, validation: Labelled | None) -> dict[str, float]:
        """Alpha and beta of the grid that are right most often on validation; without `search` they stay.

        Raises:
            BadInput: if there is no validation split to search on.
        """
        if not self.calibrates:
            return {}
        if validation is None:
            raise BadInput(
                "tip_adapter: alpha and beta are searched on validation, and the recipe names none. Give "
                "data.validation, or set method.search: false."
            )
        rows = validation.features.valid
        c = self.config
        best = cache_affinity.search(
            *self._parts(validation.features.image[rows]),
            self.bank.support_labels,
            validation.labels[rows],
            cache_affinity.grid(c.max_beta, c.beta_steps),
            # alone, the cache predicts the same whatever its weight
            cache_affinity.grid(c.max_alpha, c.alpha_steps) if c.text else [float(self.alpha)],
        )
        scores = {"validation_accuracy": 0.0}
        if best is not None:
            self.beta.fill_(best[0])
            self.alpha.fill_(best[1])
            scores["validation_accuracy"] = best[2] / int(rows.sum())
        return {"alpha": float(self.alpha), "beta": float(self.beta), **scores}

    def export(self) -> dict[str, Tensor]:
        """`keys` (M, D), `labels` (M,), `alpha`, `beta`, and with texts `text` (C, D) and `scale`."""
        keys = self.keys.detach() if self.config.train_keys else self._frozen_keys()
        tensors = {"keys": keys, "labels": self.bank.support_labels, "alpha": self.alpha, "beta": self.beta}
        if self.config.text:
            tensors |= {
                "text": unit_ensemble(at_least_float32(self.bank.positive)),
                "scale": keys.new_tensor(self.logit_scale),
            }
        return tensors


class TipAdapterTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "tip_adapter_"
    head_class = TipAdapterHead


class TipAdapter(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = TipAdapterOptions
    Config = TipAdapterConfig
    Tuner = TipAdapterTuner
    tables = (".keys",)


ENTRY = TipAdapter
