"""Texts read as one row without padding: losses and gradients of padded rows, for every family and kind of method."""

import dataclasses

import pytest
import torch

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.methods import get
from tests.helpers.models import tiny_mllm

FAMILIES = list(tiny_mllm.FAMILIES)
METHODS = {
    "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "routed_lora": {"r": 2, "route": "matmul1"},
    "routed_adapter": {"r": 4, "route": "add", "pool": "mean"},
    "adapter": {"r": 4},
    "aurora": {"r": 2, "dropout": 0.0, "towers": ["text"]},
    "graph_lora": {"r": 2},
    "p_adapter": {"r": 2, "r2": 2},
    "deep_prompt": {"length": 3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: tiny_mllm.write(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def image(seed):
    shape = (3, 6 + seed % 5, 16 - 2 * (seed % 4))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def batch_of(backbone):
    """An image and a question; two images; two questions about one image; talk without image; a slot of weight 0."""
    talk = Prompted("and the square ?", "blue .", (("user", "is there a circle ?"), ("assistant", "no .")))
    samples = [
        ([1], [Prompted("what color is it ?", "red .")], 1.0),
        ([2, 3], [Prompted("<image> and <image> same shape ?", "no")], 1.0),
        ([4], [Prompted("is it round ?", "yes"), Prompted("what shape is it ?", "a big circle .")], 1.0),
        ([], [talk], 1.0),
        ([], [Prompted("is it red ?", "no")], 0.0),
    ]
    transform = backbone.image_transform(False)
    given = [
        Sample(str(i), weight, [transform(image(n)) for n in images], texts, [0] * len(texts))
        for i, (images, texts, weight) in enumerate(samples)
    ]
    return pack(given, backbone.collate_images, backbone.collate_texts, lambda t: {})


def made(folder, method, attention="sdpa", condition="tokens", dtype=torch.float64):
    """A model with a method whose trained weights are no longer those of the start, which may change nothing."""
    backbone = ENTRY(Options(folder, condition=condition), None)
    backbone.attention, backbone.dtype = attention, dtype
    base = backbone.build().eval()
    entry = get(method)
    config = entry.config(entry.Options(**METHODS[method]), lambda key: key)
    from mmpeft_ds.sites import find_sites

    model = entry.attach(entry.prepare(config, base, find_sites(base)), base).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return backbone, model


def outcome(backbone, model, batch, scores):
    """Losses of each text, and the gradient of their weighted sum to every trained tensor."""
    model.zero_grad()
    output = forward(model, backbone, batch, scores=scores)
    losses, tokens = output.token_losses()
    (losses * batch.text_weight).sum().backward()
    return (
        losses.detach(),
        tokens,
        output.tokens_right(),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


def compare(backbone, model, scores=True, tolerance=1e-9):
    batch = batch_of(backbone)
    padded = outcome(backbone, model, batch, scores)
    one_row = outcome(backbone, model, dataclasses.replace(batch, padding_free=True), scores)
    torch.testing.assert_close(one_row[0], padded[0], rtol=tolerance, atol=tolerance)
    assert one_row[1].tolist() == padded[1].tolist()
    assert one_row[2].tolist() == padded[2].tolist()
    assert one_row[3].keys() == padded[3].keys() and padded[3]
    for name, gradient in padded[3].items():
        torch.testing.assert_close(one_row[3][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_gives_the_losses_and_gradients_of_padded_rows(folders, family):
    compare(*made(folders[family], "lora"))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_every_method_sees_each_text_by_itself(folders, method):
    compare(*made(folders["llava"], method))
