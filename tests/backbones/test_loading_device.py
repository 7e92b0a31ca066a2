"""Pretrained weights are read straight to a device; a stand-in for it is `meta`, which takes no memory."""

import pytest
import torch
from torch import nn

from mmpeft_ds.backbones.common import tower_loading
from tests.helpers.models import tiny_backbones, tiny_clip_bart

# What is drawn, or set, instead of being read.
DRAWN = {
    "vision_text_encoder": ("head.", "feature_"),
    "vision_text_decoder": ("projection.",),
    "dual_encoder": ("image_projection.", "text_projection.", "logit_scale."),
    "clip_bart": ("visual_embedding.",),
}


def on_host(model: nn.Module) -> dict[str, int]:
    """Name and bytes of each parameter in the memory of the host."""
    return {name: p.nbytes for name, p in model.named_parameters() if p.device.type == "cpu"}


def make(name: str, folder):
    if name == "clip_bart":
        return tiny_clip_bart.make(folder, vision="vit", order_tokens=0)
    return tiny_backbones.MAKERS[name](folder)


@pytest.mark.parametrize("name", sorted(set(tiny_backbones.MAKERS)))
def test_pretrained_weights_never_lie_in_the_memory_of_the_host(tmp_path, name):
    backbone = make(name, tmp_path)
    if name == "vision_text_encoder":
        backbone.options.head_input = "raw"
    backbone.device = torch.device("meta")
    rest = on_host(backbone.build())
    assert all(key.startswith(DRAWN.get(name, ("\0",))) for key in rest), sorted(rest)
    # Control: without a device all of it lies there.
    backbone.device = None
    whole = backbone.build()
    assert len(on_host(whole)) == len(list(whole.parameters())) > len(rest)


def test_what_a_checkpoint_may_lack_is_drawn_on_the_host_for_the_same_numbers_everywhere(tmp_path):
    encoder = tiny_backbones.MAKERS["vision_text_encoder"](tmp_path / "encoder")
    bart = tiny_clip_bart.make(tmp_path, vision="vit", order_tokens=9)
    encoder.options.head_input = "pooler"
    for backbone in (encoder, bart):
        backbone.device = torch.device("meta")
        model = backbone.build()
        assert {p.device.type for p in model.text_model.parameters()} == {"cpu"}
        assert {p.device.type for p in model.vision_model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("device", "keywords"),
    [
        (None, {}),
        (torch.device("cpu"), {}),
        (torch.device("cuda", 3), {"device_map": {"": torch.device("cuda", 3)}}),
    ],
)
def test_the_host_needs_no_map(device, keywords):
    assert tower_loading.placed(device) == keywords
