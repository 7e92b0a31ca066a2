"""A model of frozen features: the module that scores them is its only site."""

from __future__ import annotations

from mmpeft_ds.sites.base import Block, Family, Sites, base_layer
from mmpeft_ds.sites.feature_site import FeatureSite


def _site(block: Block) -> Sites:
    if block.path.endswith("base_layer"):  # inside the wrapper, which is the site
        return Sites()
    scorer = base_layer(block.module)
    bank = scorer.bank
    holds = {f"has_{name}": there for name, there in bank.holds.items()}
    sizes = (scorer.image_width, scorer.text_width, bank.num_classes)
    return Sites(features=[FeatureSite(block.path, *sizes, **holds, live_images=scorer.live_images)])


ENTRY = Family(towers={"FeatureModel": "image"}, layers={"ZeroShot": _site, "HeadLayer": _site})
