"""HeGraphAdapter on a tiny bank of features in float64."""

import peft
import torch

from mmpeft_ds import HeGraphConfig
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.sites.feature_site import Bank

C, D, TAU = 5, 8, 7.0
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 4])


def draw(*shape, seed=0, dtype=torch.float64):
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def base(dtype=torch.float64, classes=C, labels=LABELS, width=D, **parts):
    """A model of features whose bank has two positive and three negative prompts a class, or other `parts`."""
    bank = {
        "positive": draw(classes, 2, D, seed=1, dtype=dtype),
        "negative": draw(classes, 3, D, seed=2, dtype=dtype),
        "support": draw(len(labels), 2, width, seed=3, dtype=dtype),
        "support_labels": labels,
    }
    config = FeatureConfig(image_width=width, num_classes=classes, logit_scale=TAU, ensemble="raw")
    return FeatureModel(config, Bank(classes, **bank | parts))


def made(seed=0, model=None, **options):
    """The model with a HeGraphAdapter, and the head by itself."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base() if model is None else model, HeGraphConfig(**options))
    return model, head_of(model)


Z, Y = draw(6, D, seed=4), torch.tensor([0, 4, 2, 2, 1, 3])


@torch.no_grad()
def scores(model, z=Z):
    """Of the text part, of the image part, and of both."""
    out = model(image_features=z)
    return out.terms[0][1], out.terms[1][1], out.logits
