"""HeGraphAdapter as a peft method: the head on the bank of a model of features, its tuner and its entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.shards import all_reduced, share
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.few_shot import Remembered
from mmpeft_ds.methods.common.head import Head, HeadMethod, HeadTuner
from mmpeft_ds.methods.hegraph.config import HeGraphConfig
from mmpeft_ds.methods.hegraph.head import ClassGraphHead
from mmpeft_ds.methods.hegraph.nodes import Nodes
from mmpeft_ds.methods.hegraph.options import HeGraphOptions
from mmpeft_ds.ops import class_graph as ops
from mmpeft_ds.sites.feature_site import Features, Labelled, Scores

CHUNK = 1024  # validation rows at a time: their affinity to the cache is (rows, M)
SEARCHED = ("np", "vp", "vv")  # relations whose factors are searched, and after them w


class BankHead(ClassGraphHead, Head):
    """The head on the bank of a model of features; of what is shared out, a rank works on its part of the bank.

    `searched` (4,) holds the multiples of the factors of n -> p, v -> p and v -> v and of w that evaluation uses; ones
    unless `search` has found better.
    """

    needs = ("text", "negative", "support")

    def __init__(self, config: HeGraphConfig, base: nn.Module):
        super().__init__(config, base)
        self._once = Remembered()
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

        if config.search:
            self.calibrated = ("searched",)
            ones = torch.ones(len(SEARCHED) + 1, dtype=torch.float64, device=bank.positive.device)
            self.register_buffer("searched", ones)

    @classmethod
    def needed(cls, config: HeGraphConfig) -> tuple[str, ...]:
        """Without relation np nobody reads the negated texts."""
        return cls.needs if "np" in config.relations else ("text", "support")

    @property
    def calibrates(self) -> bool:
        return self.config.search

    @property
    def fusion(self) -> float:
        return self.coefficients.fusion * self._multiple()

    def _multiple(self) -> float:
        """Result of the search for `fusion`, copied from the device once."""
        return self._once.get("fusion", lambda found: float(found[-1]), self.searched) if self.calibrates else 1.0

    def message_factors(self, training: bool) -> Tensor:
        factors = super().message_factors(training)
        if training or not self.calibrates:
            return factors
        multiples = dict(zip(SEARCHED, self.searched, strict=False))
        one = torch.ones((), dtype=torch.float64, device=factors.device)
        return factors * torch.stack([multiples.get(name, one) for name in self.relations]).to(factors.dtype)

    def nodes(self) -> Nodes:
        bank = self.bank
        negative = bank.negative_text if "np" in self.relations else None
        whole = Nodes(bank.text, negative, bank.prototypes, bank.cache, bank.support_labels)
        ranks, rank = collectives.world_size(self.group), collectives.rank(self.group)
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

    @torch.no_grad()
    def calibrate(self, train: Labelled, validation: Labelled | None) -> dict[str, float]:
        """The multiples that are right most often on validation; of equally good ones the first, in the order given.

        Raises:
            BadInput: if there is no validation split to search on.
        """
        if not self.calibrates:
            return {}
        if validation is None:
            raise BadInput(
                "hegraph: search: its factors are searched on validation, and the recipe names none. Give "
                "data.validation, or set method.search: false."
            )
        rows = validation.features.valid
        z, labels = validation.features.image[rows], validation.labels[rows]
        mode = self.training
        self.eval()
        tried, right = [], []
        for text, visual, multiples in self._candidates(z):
            for w in self.config.multiples:
                fused = ops.fuse(text, visual, self.coefficients.fusion * w, self.fuse)
                tried.append([*multiples, w])
                right.append((fused.argmax(1) == labels).sum())
        # over ranks, so that all choose alike even where rounding differs between them
        counts = all_reduced(torch.stack(right), group=self.group).tolist()
        best = counts.index(max(counts))
        self.searched.copy_(torch.tensor(tried[best], dtype=torch.float64))
        self.train(mode)
        # rounded: float32 would tell 0.1 as 0.10000000149
        values = [round(value, 6) for value in self.message_factors(training=False).tolist()]
        factors = dict(zip(self.relations, values, strict=True))
        names = {"np": "alpha_np_test", "vp": "alpha_vp", "vv": "gamma"}
        searched = {names[name]: factors[name] for name in SEARCHED if name in factors}
        accuracy = max(counts) / max(1, len(labels) * collectives.world_size(self.group))
        return {"validation_accuracy": accuracy, **searched, "fusion": self.fusion}

    def _candidates(self, z: Tensor) -> Iterator[tuple[Tensor, Tensor, list[float]]]:
        """Logits (N, C) of both heads for every choice of multiples. Collective where something is shared out."""
        tried = self.config.multiples
        visual = {}
        for m in tried:
            self.searched.copy_(torch.tensor([1.0, 1.0, m, 1.0]))
            visual[m] = torch.cat([self.both(part)[1] for part in z.split(CHUNK)])
        for np_vp in itertools.product(tried, tried):
            self.searched.copy_(torch.tensor([*np_vp, 1.0, 1.0]))
            text = torch.cat([self.both(part)[0] for part in z.split(CHUNK)])
            for m in tried:
                yield text, visual[m], [*np_vp, m]


class HeGraphModel(HeadTuner):
    """Tuner with the verbs of every peft tuner; see `HeGraphConfig`."""

    prefix = "hegraph_"
    head_class = BankHead


class HeGraph(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = HeGraphOptions
    Config = HeGraphConfig
    Tuner = HeGraphModel
    prefix = HeGraphModel.prefix


ENTRY = HeGraph
