"""GraphAdapter: class texts refined over a graph of texts and a graph of image prototypes (Li et al., NeurIPS 2023,
arXiv 2309.13625)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import Remembered, cosine_logits
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.graph_adapter.options import GraphAdapterOptions
from mmpeft_ds.ops import graph_adapter as ops
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.feature_site import Features, Scores


@dataclass
class GraphAdapterConfig(GraphAdapterOptions, HeadConfig):
    """GraphAdapterOptions as a peft config."""


class GraphAdapterHead(Head):
    """logits = tau u(z) u(T')^T; T' as in `ops.graph_adapter.refined`, T and image prototypes as they are."""

    needs = ("text", "support")

    def __init__(self, config: GraphAdapterConfig, base: object):
        super().__init__(config, base)
        positive = at_least_float32(self.bank.positive)
        classes, _, width = positive.shape
        if self.bank.support.shape[-1] != width:
            raise BadInput(
                f"graph_adapter: texts have {width} features and images {self.bank.support.shape[-1]}. Use towers "
                "that share a space."
            )
        self.groups = ops.groups_of(classes, config.groups)
        like = {"dtype": positive.dtype, "device": positive.device}
        for name in ("text", "image"):
            weight = torch.empty(width, width, **like).uniform_(-(width**-0.5), width**-0.5)
            self.register_parameter(f"weight_{name}", nn.Parameter(weight))
            self.register_parameter(f"bias_{name}", nn.Parameter(torch.zeros(classes, width, **like)))
        self._once = Remembered()

    @property
    def banks(self) -> tuple[Tensor, Tensor]:
        """(C, D) texts and (C, D) image prototypes, frozen."""
        return self._once.get(
            "banks",
            lambda texts, *_: (at_least_float32(texts).mean(1), at_least_float32(self.bank.prototypes)),
            self.bank.positive,
            self.bank.support,
            self.bank.support_labels,
        )

    @property
    def text(self) -> Tensor:
        """(C, D) refined class texts, not of unit length."""
        text, image = self.banks
        # Edges are frozen, so what a class receives does not change from step to step.
        received = self._once.get(
            "received",
            lambda t, v: (ops.aggregated(t, t, self.groups), ops.aggregated(t, v, self.groups)),
            text,
            image,
        )
        weights = (self.weight_text, self.weight_image, self.bias_text, self.bias_image)
        return ops.refined(text, *received, *weights, self.config.alpha, self.config.beta)

    def forward(self, features: Features) -> Scores:
        return Scores(cosine_logits(features.image, self.text, self.logit_scale))

    def graphs(self, of: str, group: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and normalised adjacency of the graphs of one group, (C, n + 1, n + 1) each, to look at.

        Args:
            of: `text` or `image`.
        """
        text, image = self.banks
        return ops.query_graphs(text, text if of == "text" else image, self.groups, group)

    def export(self) -> dict[str, Tensor]:
        """`text` (C, D) and `scale`: logits = scale u(z) u(text)^T, without a graph."""
        text = self.text.detach()
        return {"text": text, "scale": text.new_tensor(self.logit_scale)}


class GraphAdapterTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner."""

    prefix = "graph_adapter_"
    head_class = GraphAdapterHead


class GraphAdapter(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = GraphAdapterOptions
    Config = GraphAdapterConfig
    Tuner = GraphAdapterTuner


ENTRY = GraphAdapter
