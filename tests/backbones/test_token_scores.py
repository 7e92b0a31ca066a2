"""Generative backbones score the labels inside their output layer as they do from the logits of all positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.forward import forward
from tests.helpers.runs import tiny_pairs

SCORED = ["mllm", "vision_text_decoder", "blip", "blip_vqa"]
NAMES = [*SCORED, "clip_bart"]


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


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_what_logits_give(sections, name):
    written, folder = sections
    case = {"backbone": name, "method": {"name": "lora", "r": 2, "init_lora_weights": False}}
    parts = tiny_pairs.resolved(case, written, folder)
    torch.manual_seed(0)
    model = resolving.attach(parts, parts.backbone.build()).eval()
    from_logits, numbers, gradients = results(parts, model, scores=False)
    scored, other, others = results(parts, model, scores=True)
    assert from_logits.scores is None and (scored.logits is None) == (name in SCORED)
    for value, expected in zip(other, numbers, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-5)
    assert numbers[2].sum() > 10, "labels"
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(others[parameter], gradient, atol=1e-4, rtol=1e-4, msg=parameter)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
