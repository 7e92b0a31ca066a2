"""The few-shot baselines on a tiny bank."""

import peft
import torch
from torch import nn
from torch.nn.functional import normalize

from mmpeft_ds import methods
from mmpeft_ds.methods.common.head import head_of
from mmpeft_ds.sites.feature_site import Features
from tests.helpers.models import tiny_feature_model

# classes and width of the tiny model of features, and its support a class
C, D, K = 5, 8, 3
# name -> method and options
TRAINED = {
    "linear_probe": ("linear_probe", {"solver": "gradient"}),
    "clip_adapter": ("clip_adapter", {}),
    "tip_adapter_f": ("tip_adapter", {"train_keys": True}),
    "tip_adapter_f_alone": ("tip_adapter", {"train_keys": True, "text": False}),
    "task_res": ("task_res", {}),
    "graph_adapter": ("graph_adapter", {}),
}
FREE = {
    "zero_shot": ("zero_shot", {"ensemble": "raw"}),
    "linear_probe_lbfgs": ("linear_probe", {}),
    "tip_adapter": ("tip_adapter", {}),
    "tip_adapter_alone": ("tip_adapter", {"text": False}),
}
ALL = TRAINED | FREE


def attach(case: str, base: nn.Module | None = None, **options: object) -> peft.PeftModel:
    """The tiny model, or `base`, with the head of a case."""
    name, fixed = ALL.get(case, (case, {}))
    torch.manual_seed(3)
    return peft.get_peft_model(base or tiny_feature_model.model(), methods.get(name).Config(**{**fixed, **options}))


def moved(wrapped: peft.PeftModel, seed: int = 5) -> peft.PeftModel:
    """With other trained values and calibrated numbers, so that nothing agrees by being at its start."""
    made = torch.Generator().manual_seed(seed)
    head = head_of(wrapped)
    with torch.no_grad():
        for p in head.parameters():
            p += 0.3 * torch.randn(p.shape, generator=made).to(p.dtype)
        for name in head.calibrated:
            buffer = getattr(head, name)
            buffer += torch.rand(buffer.shape, generator=made).to(buffer.dtype)
    return wrapped


def say(wrapped: nn.Module, z: Features | None = None) -> torch.Tensor:
    """Logits of `z`, or of the rows of the tiny model."""
    with torch.no_grad():
        return wrapped(image_features=(z or tiny_feature_model.rows()).image).logits


def unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one."""
    return normalize(x, dim=-1)
