"""HeGraphAdapter (arXiv 2410.07854): a graph over classes refines a few-shot text classifier and shifts a cache."""

from __future__ import annotations

from torch import Tensor, nn

from mmpeft_ds.distributed.gather import group_rank, group_size
from mmpeft_ds.distributed.shards import share
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods._head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.hegraph.config import HeGraphConfig
from mmpeft_ds.methods.hegraph.head import ClassGraphHead, Nodes
from mmpeft_ds.methods.hegraph.standalone import HeGraphHead
from mmpeft_ds.ops.class_graph import Coefficients, classify
from mmpeft_ds.sites.features import Features, Scores

__all__ = ["ENTRY", "BankHead", "Coefficients", "HeGraphConfig", "HeGraphHead", "HeGraphModel", "classify"]


class BankHead(ClassGraphHead, Head):
    """The head on the bank of a model of features; of what is shared out, a rank works on its part of the bank."""

    needs = ("text", "negative", "support")

    def __init__(self, config: HeGraphConfig, base: nn.Module):
        super().__init__(config, base)
        bank = self.bank
        width = bank.positive.shape[-1]
        if bank.support.shape[-1] != width:
            raise BadInput(
                f"hegraph: images have width {bank.support.shape[-1]} and class texts {width}; cosines between them "
                "need one space. Use features of a contrastive pair of encoders."
            )
        self.set_up(
            width,
            config.coefficients,
            self.logit_scale,
            drop=config.drop,
            degree=config.degree,
            flip=config.flip,
            topk=config.topk,
            activation=config.activation,
            visual_scale=config.visual_scale,
            cache_reduce=config.cache_reduce,
            fuse=config.fuse,
            learned=config.learned,
            shard=config.shard,
            device=bank.positive.device,
            dtype=bank.positive.dtype,
        )

    @classmethod
    def needed(cls, config: HeGraphConfig) -> tuple[str, ...]:
        """Without relation np nobody reads the negated texts."""
        return cls.needs if "np" in config.relations else ("text", "support")

    def nodes(self) -> Nodes:
        bank = self.bank
        negative = bank.negative_text if "np" in self.relations else None
        whole = Nodes(bank.text, negative, bank.prototypes, bank.cache, bank.support_labels)
        ranks, rank = group_size(self.group), group_rank(self.group)
        if self.shard == "cache":
            own = share(len(whole.labels), ranks, rank)
            return Nodes(whole.positive, negative, whole.visual, whole.cache[own], whole.labels[own])
        if self.shard == "classes":
            own = share(bank.num_classes, ranks, rank)
            rows = (whole.labels >= own.start) & (whole.labels < own.stop)
            negative = None if negative is None else negative[own]
            return Nodes(whole.positive[own], negative, whole.visual[own], whole.cache[rows], whole.labels[rows])
        return whole

    def source(self) -> list[Tensor]:
        return [getattr(self.bank, name) for name in self.bank.NAMES]

    def replicated(self) -> list[Tensor]:
        return self.source()

    def forward(self, features: Features) -> Scores:
        """Log probabilities of both heads together; their cross-entropies make the loss."""
        text, visual = self.both(features.image)
        terms = [(1.0, text), (self.coefficients.visual_loss, visual)]
        return Scores(self.log_probabilities(text, visual), terms)


class HeGraphModel(HeadTuner):
    """Tuner with the verbs of every peft tuner; see `HeGraphConfig`."""

    prefix = "hegraph_"
    head_class = BankHead


class HeGraph(HeadMethod):
    """The method entry: what recipes and the engine use."""

    peft_type = "HEGRAPH"
    Config = HeGraphConfig
    Tuner = HeGraphModel
    prefix = HeGraphModel.prefix


ENTRY = HeGraph
