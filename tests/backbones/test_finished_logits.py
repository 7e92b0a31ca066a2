"""Families that scale or cap their logits score the labels inside their output layer as they do from all logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmpeft_ds import registry
from mmpeft_ds.backbones.mllm import families
from mmpeft_ds.backbones.mllm.backbone import ENTRY
from mmpeft_ds.backbones.mllm.options import Options
from mmpeft_ds.engine.assembly.forward import forward, scored_layer
from mmpeft_ds.ops import token_scores
from mmpeft_ds.ops.finished_logits import Finish
from tests.helpers.models.family_samples import ALL, batch, samples_of
from tests.helpers.models.family_traits import EVERY, write

CHANGING = {t for name in registry.names(families) for t in registry.load(families, name, "").finishes}
FAMILIES = [family for family in EVERY if family in CHANGING]
QUICK = ("gemma4", "granite_docling", "inkling2", "muse_glimmer")
CHANGES = {
    "final_logit_softcapping": 1.5,
    "logits_scaling": 3.0,
    "logit_scale": 0.3,
    "output_multiplier": 1.7,
}

IN_FLOAT32 = ("Inkling2ShortConvolution", "Inkling2TopKRouter")  # transformers computes there in float32


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """By family: a backbone whose numbers change the logits much, and its model in float64, states with gradients."""
    known: dict[str, tuple] = {}

    def _model(family: str) -> tuple:
        if family not in known:
            backbone = ENTRY(Options(write(tmp_path_factory.mktemp(family), family)), None)
            usual = "eager" if backbone.attentions == ("eager",) else "sdpa"
            backbone.attention, backbone.dtype = usual, torch.float64
            backbone.check()
            model = backbone.build().eval().requires_grad_(False)
            for module in model.modules():
                if type(module).__name__ in IN_FLOAT32:
                    module.float()
            for text in (backbone._config.get_text_config(), model.config.get_text_config()):
                for name, value in CHANGES.items():
                    if hasattr(text, name):
                        setattr(text, name, value)
            for config in (model.config, model.config.get_text_config()):
                config._experts_implementation = "eager"  # the usual one does not know float64
            for module in model.modules():  # what was read of the configuration when the model was made
                for name, value in {**CHANGES, "softcap": CHANGES["final_logit_softcapping"]}.items():
                    if isinstance(vars(module).get(name), float) and "Gate" not in type(module).__name__:
                        setattr(module, name, value)
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(20)
            known[family] = backbone, model
        return known[family]

    return _model


def losses(backbone, model, scores: bool) -> tuple:
    """Plain and smoothed losses of a batch, and the gradients of the last norm's weight and what trains."""
    outputs = forward(model, backbone, batch(backbone, *samples_of(backbone, *ALL)), scores=scores)
    assert (outputs.scores is not None) == scores
    plain, smooth = outputs.token_losses()[0], outputs.token_losses(0.1)[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    return (plain, smooth, *torch.autograd.grad((plain + smooth).sum(), trained))


def compare(backbone, model) -> None:
    rounded = backbone._config.model_type == "inkling2"  # it makes its logits float32
    within = {"atol": 1e-5, "rtol": 1e-4} if rounded else {"atol": 1e-11, "rtol": 1e-9}
    for found, expected in zip(losses(backbone, model, True), losses(backbone, model, False), strict=True):
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found.to(expected), expected, **within)


def last_norm(model) -> torch.nn.Parameter:
    """A weight in front of the output layer."""
    text = [(n, p) for n, p in model.named_parameters() if "vision" not in n and "norm" in n and p.dim() == 1]
    return dict(text)[max((n for n, _ in text), key=lambda n: (".layers." not in n, n))]


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_losses_and_gradients_are_those_of_all_logits(model_of, family, monkeypatch):
    backbone, model = model_of(family)
    monkeypatch.setattr(token_scores, "LOGITS", 1 << 9)
    last_norm(model).requires_grad_()
    compare(backbone, model)
    assert scored_layer(backbone, model) is model.get_output_embeddings()


@pytest.mark.parametrize("family", ["gemma4", "granite_docling", "inkling2"])
def test_an_output_layer_that_trains_is_scored_too(model_of, family):
    backbone, model = model_of(family)
    head = model.get_output_embeddings()
    head.weight.requires_grad_()
    compare(backbone, model)
    head.weight.requires_grad_(False)


@pytest.mark.parametrize("family, wrong", [("gemma4", {"cap": None}), ("muse_glimmer", {"scale": 1.0})])
def test_another_cap_or_factor_gives_other_losses(model_of, family, wrong):
    backbone, model = model_of(family)
    last_norm(model).requires_grad_()
    expected = losses(backbone, model, False)[0]
    backbone._finish = dataclasses.replace(backbone._finish, **wrong)
    found = losses(backbone, model, True)[0]
    del backbone._finish
    assert (found - expected).abs().max() > 0.01


@pytest.mark.parametrize("finish", [Finish(0.3), Finish(1.7, 2.0), Finish(cap=5.0)])
def test_derivatives_are_those_of_autograd(finish):
    logits = (4 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    finished = finish(logits)
    (expected,) = torch.autograd.grad(finished.sum(), logits)
    other = logits.detach().clone()
    slope = finish.apply_(other)
    torch.testing.assert_close(other, finished.detach(), atol=1e-12, rtol=1e-12)
    assert (slope is None) == (finish.cap is None)
    derivatives = torch.ones_like(other) if slope is None else slope
    torch.testing.assert_close(finish.scale * derivatives, expected, atol=1e-12, rtol=1e-12)


def test_every_family_that_changes_its_logits_is_compared():
    assert set(FAMILIES) == CHANGING and len(FAMILIES) == 12
