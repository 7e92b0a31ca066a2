"""Every family with its texts in one row: losses and gradients of padded rows, each text with its own image's
condition."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.engine import padding
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers.models import family_samples, family_traits

FAMILIES = family_traits.having("packed")
# Causal with M-RoPE; blocks of image tokens; a state carried on; a sliding window; a prefix.
QUICK = ("qwen3_vl", "gemma3", "qwen3_5", "aya_vision", "paligemma")
# How attention learns where texts end: by a mask of the row, or each text goes by itself. In float64, since float32
# rounds gradients by up to 2e-5 of the largest.
WAYS = ("mask", "lengths")
# Parts that transformers computes in float32, so that gradients are rounded there.
ROUNDED = {"inkling2": ("Inkling2ShortConvolution", "Inkling2TopKRouter")}


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return family_traits.write(tmp_path_factory.mktemp(request.param), request.param)


some_quick = pytest.mark.parametrize(
    "folder", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES], indirect=True
)


def adapted(folder, way, method="routed_lora"):
    backbone = ENTRY(Options(folder, condition="pooled" if method == "routed_lora" else "none"), None)
    usual = "sdpa" if way == "mask" else backbone.row_attention
    backbone.attention, backbone.dtype = "eager" if backbone.attentions == ("eager",) else usual, torch.float64
    backbone.check()
    assert not backbone.unpackable
    base = backbone.build().eval()
    for config in (base.config, base.config.get_text_config()):
        config._experts_implementation = "eager"  # the usual one does not know float64
    for module in base.modules():
        if type(module).__name__ in ROUNDED.get(backbone._config.model_type, ()):
            module.float()
    model = family_samples.attached(method, backbone, base).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return backbone, model


def outcome(backbone, model, batch):
    model.zero_grad()
    output = forward(model, backbone, batch, scores=True)
    losses, tokens = output.token_losses()
    (losses.sum() / tokens.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients, tuple(map(int, padding.places(output, batch)))


def compare(backbone, model):
    batch = family_samples.batch(backbone, *family_samples.samples_of(backbone, *family_samples.ALL))
    padded_losses, padded, places = outcome(backbone, model, batch)
    losses, gradients, row_places = outcome(backbone, model, dataclasses.replace(batch, padding_free=True))
    assert row_places[0] == row_places[1] == places[1]
    assert row_places[0] < places[0] or backbone._config.model_type == "paligemma"  # whose texts are of one length
    torch.testing.assert_close(losses, padded_losses, rtol=1e-6, atol=0)
    assert gradients.keys() == padded.keys() and all(g.abs().sum() > 0 for g in padded.values())
    for name, gradient in padded.items():
        atol = (1e-4 if backbone._config.model_type in ROUNDED else 1e-6) * float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


@some_quick
@pytest.mark.parametrize("way", WAYS)
def test_one_row_gives_the_losses_and_gradients_of_padded_rows(folder, way):
    backbone = ENTRY(Options(folder), None)
    if way == "lengths" and (not backbone.row_attention or backbone.attentions == ("eager",)):
        pytest.skip("a mask alone tells its texts apart")
    without_sites = backbone._config.model_type in family_samples.WITHOUT_SITES
    compare(*adapted(folder, way, "lora" if without_sites else "routed_lora"))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["qwen3_vl", "gemma3", "qwen3_5"], indirect=True)
def test_blocks_that_are_computed_again_see_where_texts_end(folder):
    backbone, model = adapted(folder, "lengths")
    enable_checkpointing(model.get_base_model())
    compare(backbone, model.train())


@pytest.mark.parametrize(
    "folder", ["gemma3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama4", "qwen4_exp"))], indirect=True
)
def test_attention_with_a_mask_too_goes_from_text_to_text(folder, monkeypatch):
    """Also with one of the model's own no query meets the keys of another text."""
    backbone, model = adapted(folder, "lengths", "lora")
    batch = family_samples.batch(backbone, *family_samples.samples_of(backbone, *family_samples.ALL))
    met, sdpa = [], text_attention.sdpa_attention_forward

    def noting(module, query, key, value, attention_mask, **kwargs):
        if getattr(module, "is_causal", False):  # not a tower's
            met.append((query.shape[2], key.shape[2], attention_mask is not None))
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(text_attention, "sdpa_attention_forward", noting)
    row = dataclasses.replace(batch, padding_free=True)
    lengths = forward(model, backbone, row, scores=True).lengths.tolist()
    assert met and {(q, k) for q, k, _ in met} == {(n, n) for n in lengths} and any(masked for *_, masked in met)


@pytest.fixture
def scaled(tmp_path):
    """A Llama 4 that scales the queries of every fourth place on."""
    folder = family_traits.write(tmp_path, "llama4")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_queries_of_llama4_are_scaled_by_their_places_in_their_texts(scaled, way):
    compare(*adapted(scaled, way))


def test_queries_that_are_scaled_by_their_places_in_the_row_give_other_losses(scaled):
    """The negative control."""
    backbone, model = adapted(scaled, "lengths", "lora")
    for module in model.modules():
        if type(module).__name__ == "Llama4TextAttention":
            del module.forward
    with pytest.raises(AssertionError, match="not close"):
        compare(backbone, model)


@pytest.mark.parametrize("folder", ["qwen3_5"], indirect=True)
def test_a_state_that_runs_on_through_the_row_gives_other_losses(folder, monkeypatch):
    """The negative control."""
    backbone, model = adapted(folder, "mask", "lora")
    for module in model.modules():
        if type(module).__name__ in backbone._family.carrying:
            del module.forward
    with pytest.raises(AssertionError, match="not close"):
        compare(backbone, model)


@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
def test_the_mask_that_transformers_makes_of_positions_gives_other_losses_for_images_that_look_ahead(
    folder, monkeypatch
):
    """The negative control."""
    backbone, model = adapted(folder, "mask", "lora")
    monkeypatch.setattr(type(backbone._family), "looks_ahead", lambda self, config: False)
    with pytest.raises(AssertionError, match="not close"):
        compare(backbone, model)


def test_the_table_in_the_documentation_is_the_one_that_is_tried():
    section = Path("docs/packing.md").read_text().split("## Families")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    table = {name: cells[-1].strip() for cells in rows for name in re.findall("`([a-z0-9_]+)`", cells[0])}
    assert table.keys() == set(family_traits.EVERY)
