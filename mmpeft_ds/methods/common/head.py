"""Heads on frozen features: the head itself, its wrapper, its tuner, and the base of its method entry."""

# B rows, C classes, D width

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.tuner import SiteTuner
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.sites.feature_site import Bank, Calibrated, Features, FeatureSite, Labelled, Scores

PARTS = {"text": "class texts", "negative": "negated class texts", "support": "support samples"}


class Head(Calibrated):
    """One adapter's head. Parameters and buffers are its own; the bank belongs to the frozen base.

    A subclass gives `forward`. Collectives in it run in the same order on all ranks.

    Args:
        config: of the method.
        base: the frozen scorer (`ZeroShot`), which is read and never becomes part of the head.

    Attributes:
        needs: which parts of the bank it reads, of `text`, `negative`, `support`; default none.
        calibrated: persistent buffers that `calibrate` sets; default none.
        follows_training: training differs from evaluation by more than dropout, so that the head is put into training
            mode during steps, where the rest of the model may be in evaluation mode; default not.
        over_batch: scores rows over a graph of the batch, and offers `without_edges` and `top1`; default not.
        reads_frozen_images: `forward` compares with `Features.further["frozen"]` now; default not.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    follows_training: ClassVar[bool] = False
    over_batch: ClassVar[bool] = False
    reads_frozen_images: bool = False

    def __init__(self, config: Any, base: nn.Module):
        super().__init__()
        self.config = config
        self._base = (base,)  # in a tuple, which hides it from torch: the base is saved and moved by its own model

    @property
    def base(self) -> nn.Module:
        """The frozen scorer."""
        return self._base[0]

    @property
    def bank(self) -> Bank:
        """Class texts and support samples."""
        return self.base.bank

    @property
    def logit_scale(self) -> float:
        """Factor of the cosine, 1 / temperature."""
        return self.base.logit_scale

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        """Parts of the bank that this configuration reads."""
        return cls.needs

    def forward(self, features: Features) -> Scores:
        raise NotImplementedError

    @property
    def calibrates(self) -> bool:
        """Whether `calibrate` has something to find; else the rows need not be read."""
        return type(self).calibrate is not Head.calibrate

    def calibrate(self, train: Labelled, validation: Labelled | None) -> dict[str, float]:
        """After training: search or solve what is not trained by gradient, on validation, never on test.

        All ranks call it with the same rows, whole parameters, and must come to the same result.

        Returns:
            numbers worth telling.
        """
        return {}

    def estimating_fisher(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `forward` gives the logits of which Fisher information is estimated. Default: those of training."""
        return contextlib.nullcontext()

    def export(self) -> dict[str, Tensor]:
        """Tensors of a classifier that needs neither bank nor graph; empty where there is no such form."""
        return {}


class HeadLayer(nn.Module, SiteLayer):
    """The frozen scorer and a head per adapter, at `PATH.{prefix}head.ADAPTER`; the first active one scores.

    Args:
        base: the frozen scorer (`ZeroShot`).
        prefix: of the method's parameter names; ends in `_`.
    """

    def __init__(self, base: nn.Module, adapter_name: str, prefix: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self._heads = f"{prefix}head"
        self.adapter_layer_names = (self._heads,)
        setattr(self, self._heads, nn.ModuleDict())

    @property
    def heads(self) -> nn.ModuleDict:
        """The head of each adapter."""
        return getattr(self, self._heads)

    @property
    def head(self) -> Head | None:
        """The head that scores; None while adapters are disabled."""
        if self._disable_adapters:
            return None
        return next((self.heads[name] for name in self.active_adapters if name in self.heads), None)

    @property
    def reads_frozen_images(self) -> bool:
        """See the head that scores."""
        return self.head is not None and self.head.reads_frozen_images

    def forward(self, features: Features) -> Scores:
        head = self.head
        return self.base_layer(features) if head is None else head(features)


class HeadTuner(SiteTuner):
    """Tuner of a head method; a subclass sets `prefix` and `head_class`."""

    head_class: ClassVar[type[Head]]

    @classmethod
    def unmergeable(cls, config: HeadConfig) -> str:
        return "a head takes the place of the frozen scorer and cannot be folded into it."

    def places(self, config: HeadConfig, model: nn.Module) -> dict[str, FeatureSite]:
        site = feature_site(config, find_sites(model))
        check_bank(self.head_class, config, site)
        return {site.path: site}

    def wrap(
        self, config: HeadConfig, adapter_name: str, target: nn.Module, place: FeatureSite, path: str
    ) -> nn.Module:
        layer = target if isinstance(target, HeadLayer) else HeadLayer(target, adapter_name, self.prefix)
        layer.heads[adapter_name] = self.head_class(config, base_layer(layer))
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
        return layer


class HeadMethod(SiteMethod):
    """Base of the `ENTRY` of a head method: as `SiteMethod`, with a `HeadTuner`."""

    Tuner: ClassVar[type[HeadTuner]]

    @classmethod
    def check(cls, config: HeadConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput where there are no features, or the bank lacks what the head reads."""
        check_bank(cls.Tuner.head_class, config, feature_site(config, sites))

    @classmethod
    def bank_parts(cls, config: HeadConfig) -> tuple[str, ...]:
        return cls.Tuner.head_class.needed(config)


def feature_site(config: HeadConfig, sites: Sites) -> FeatureSite:
    """The one place where a head attaches. Raises BadInput."""
    if len(sites.features) != 1:
        raise BadInput(
            f"{config.method}: needs a model of features of frozen encoders, and this is none. In Python attach it to "
            "a mmpeft_ds.backbones.features.model.FeatureModel, in a recipe use backbone: {name: features}; the "
            "encoder of both may be a CLIP."
        )
    return sites.features[0]


def check_bank(head_class: type[Head], config: Any, site: FeatureSite) -> None:
    """Raise BadInput if the bank lacks what the head reads."""
    for part in head_class.needed(config):
        if not getattr(site, f"has_{part}"):
            raise BadInput(
                f"{config.method}: needs {PARTS[part]}, which are not there. Make feature shards with templates "
                "(launchers/features.py) and name a train split with labels."
            )


def head_of(model: nn.Module) -> Head | None:
    """The active head of a model of features, through any wrappers; None where none is attached."""
    heads = [module for module in model.modules() if isinstance(module, HeadLayer)]
    return heads[0].head if heads else None
