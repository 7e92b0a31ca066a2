"""Generative backbones score the labels inside their output layer as they do from the logits of all positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.forward import forward, scored_layer
from tests.helpers.runs import tiny_pairs

NAMES = ["mllm", "vision_text_decoder", "blip", "blip_vqa", "clip_bart"]
LORA = {"name": "lora", "r": 2, "init_lora_weights": False}
HEADS = {
    "mllm": "lm_head",
    "vision_text_decoder": "lm_head",
    "blip": "text_decoder.cls.predictions.decoder",
    "blip_vqa": "text_decoder.cls.predictions.decoder",
    "clip_bart": "text_model.lm_head",
}

IN_HEADS = {
    "lora": LORA,
    "lora with a bias": {**LORA, "lora_bias": True},
    "dora": {**LORA, "use_dora": True},
    "ia3": {"name": "ia3", "feedforward_modules": []},
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("scores")
    return tiny_pairs.write_backbones(folder, set(NAMES)), folder


def results(parts, model, scores: bool) -> tuple:
    """Losses with and without smoothing, right tokens, and gradients, of a batch with padding and bare texts."""
    batch = tiny_pairs.packed(tiny_pairs.slots_of(0, parts.backbone), parts.backbone, parts.train[0].task)
    outputs = forward(model, parts.backbone, batch, scores=scores)
    plain, count = outputs.token_losses()
    smooth, _ = outputs.token_losses(0.1)
    weight = torch.linspace(0.5, 2, len(plain))
    model.zero_grad()
    (weight * (plain + smooth)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return outputs, (plain, smooth, count, outputs.tokens_right()), gradients


def built(sections, name: str, method: dict) -> tuple:
    """Parts and model of a backbone, in float64."""
    written, folder = sections
    parts = tiny_pairs.resolved({"backbone": name, "method": method}, written, folder)
    torch.manual_seed(0)
    model = resolving.attach(parts, parts.backbone.build()).eval().double()
    if name == "clip_bart":  # whose tiny checkpoint has a bias of zeros
        model.get_base_model().text_model.final_logits_bias.normal_()
    return parts, model


def compare(parts, model) -> dict:
    """Scores against logits: losses, numbers and all gradients; returns the gradients."""
    from_logits, numbers, gradients = results(parts, model, scores=False)
    scored, other, others = results(parts, model, scores=True)
    assert from_logits.scores is None and scored.logits is None and scored.scores.nll.dtype == torch.float64
    for value, expected in zip(other, numbers, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
    assert numbers[2].sum() > 10, "labels"
    assert gradients.keys() == others.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(others[parameter], gradient, atol=1e-12, rtol=1e-9, msg=parameter)
    return gradients


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_what_logits_give(sections, name):
    gradients = compare(*built(sections, name, LORA))
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_an_output_layer_that_trains_whole_is_scored_too(sections, name):
    parts, model = built(sections, name, {**LORA, "modules_to_save": [HEADS[name]]})
    gradients = compare(parts, model)
    assert any("modules_to_save" in n and float(g.abs().max()) > 1e-3 for n, g in gradients.items())
    with model.disable_adapter():
        assert scored_layer(parts.backbone, model.get_base_model()).weight.requires_grad is False


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", IN_HEADS)
def test_an_output_layer_with_adapters_is_scored_too(sections, name, method):
    parts, model = built(sections, name, {**IN_HEADS[method], "target_modules": [HEADS[name]]})
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    gradients = compare(parts, model)
    in_head = [float(g.abs().max()) for n, g in gradients.items() if HEADS[name] in n]
    assert in_head and min(in_head) > 1e-3
    batch = tiny_pairs.packed(tiny_pairs.slots_of(0, parts.backbone), parts.backbone, parts.train[0].task)
    with torch.no_grad(), model.disable_adapter():
        expected, found = (forward(model, parts.backbone, batch, scores=scores) for scores in (False, True))
    torch.testing.assert_close(found.token_losses(0.1), expected.token_losses(0.1), atol=1e-12, rtol=1e-12)
