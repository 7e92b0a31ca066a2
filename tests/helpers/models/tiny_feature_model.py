"""A tiny model of features with a full bank, for heads."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.sites.feature_site import Bank, Features, Labelled


def model(
    classes: int = 5,
    width: int = 8,
    text_width: int = 8,
    support: int = 3,
    views: int = 2,
    templates: int = 2,
    scale: float = 10.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> FeatureModel:
    """`support` samples a class with `views` passes each; 0 leaves a part of the bank out."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    bank = Bank(
        classes,
        draw(classes, templates, width) if templates else None,
        draw(classes, templates, width) if templates else None,
        draw(classes * support, views, width) if support else None,
        torch.arange(classes).repeat_interleave(support) if support else None,
    )
    config = FeatureConfig(image_width=width, text_width=text_width, num_classes=classes, logit_scale=scale)
    return FeatureModel(config, bank).requires_grad_(False).eval()


def rows(
    count: int = 7, width: int = 8, text_width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Features:
    """Rows to score, all valid."""
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)

    text = draw(count, text_width) if text_width else None
    return Features(draw(count, width), text, torch.ones(count, dtype=torch.bool), torch.arange(count))


def labelled(count: int = 20, classes: int = 5, **options: object) -> Labelled:
    """Rows with classes in turn."""
    return Labelled(rows(count, **options), torch.arange(count) % classes)
