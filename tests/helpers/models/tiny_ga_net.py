"""A GA-Net on a model of features, with the weights of a reference vector file."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from mmpeft_ds import GaNetConfig
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel
from mmpeft_ds.methods.ga_net.head import GaNetHead
from tests.helpers.goldens import Golden

NAMES = {  # file -> parameter
    "Wd": "down.weight",
    "bd": "down.bias",
    "W1": "conv.weight",
    "b1": "conv.bias",
    "Wu": "up.weight",
    "bu": "up.bias",
    "W2": "classifier.weight",
    "b2": "classifier.bias",
    "Wt": "fusion.text.weight",
    "bt": "fusion.text.bias",
    "Wv": "fusion.image.weight",
    "bv": "fusion.image.bias",
    "Wa1": "fusion.hidden.weight",
    "ba1": "fusion.hidden.bias",
    "Wa2": "fusion.weigh.weight",
    "ba2": "fusion.weigh.bias",
}


class Model:
    """The peft model of a file in float64: text and image features are the halves of its rows.

    Args:
        widths: of a row, of the bottleneck.
        classes: C.
        options: of the method.
    """

    def __init__(self, width: int, r: int, classes: int, **options: Any):
        self.half = width // 2
        base = FeatureModel(FeatureConfig(image_width=width - self.half, text_width=self.half, num_classes=classes))
        self.peft = peft.get_peft_model(base, GaNetConfig(r=r, **options)).double()
        self.head: GaNetHead = base.features.head

    @classmethod
    def of(cls, golden: Golden, suffix: str = "", **options: Any) -> Model:
        """With the weights of a file, whose names end in `suffix`."""
        r, width = golden.array(f"Wd{suffix}").shape
        if f"Wt{suffix}" in golden:
            options["fusion_width"] = len(golden.array(f"Wt{suffix}"))
        made = cls(width, r, golden.array(f"W2{suffix}").shape[1], **options)
        made.load({key: golden.tensor(key + suffix) for key in NAMES if key + suffix in golden})
        return made

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Set parameters or buffers by the names of the files."""
        state = self.head.state_dict()
        for key, weight in weights.items():
            assert state[NAMES[key]].shape == weight.shape, key
            state[NAMES[key]].copy_(weight)

    def __call__(self, x: Tensor, **arguments: Any) -> Any:
        """Outputs of the model for rows (B, D)."""
        return self.peft(text_features=x[:, : self.half], image_features=x[:, self.half :], **arguments)

    def parameter(self, key: str) -> torch.nn.Parameter:
        return self.head.get_parameter(NAMES[key])


def dense(graph: Any) -> Tensor:
    """(B, M) matrix of a graph's edges, not normalised: how often each source reaches each own target."""
    matrix = torch.zeros(int(graph.counts[0]), graph.num_sources, dtype=torch.float64)
    return matrix.index_put_((graph.target, graph.source), torch.ones(len(graph.source)).double(), accumulate=True)
