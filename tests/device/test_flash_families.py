"""Families of multimodal language models where flash-attn is installed: `auto` gives the losses of SDPA, with it where
the model has a form for it, and texts in one row go through its kernel for sequences of different lengths."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.engine.assembly.forward import forward
from tests.helpers.device import installing
from tests.helpers.models import family_samples, family_traits

# A tower without a form for it, a language model without, one with images in parts, one whose texts look ahead.
QUICK = ("lfm2_vl", "llama4", "deepseek_ocr2", "paligemma")
NONE = ("gemma3", "gemma4_unified", "glm5_next", "llama4", "minimax_m3_vl", "mistral_large4", "molmo2", "paligemma")
NONE += ("got_ocr2", "inkling2", "qwen4_exp", "step3p7")


def losses(folder: str, attention: str, row: bool) -> tuple[torch.Tensor, str]:
    """Mean loss of each text, and the attention of the language model."""
    backbone = ENTRY(Options(folder), None)
    backbone.attention, backbone.dtype = attention, torch.float16
    backbone.check()
    model = backbone.build().eval()
    batch = family_samples.batch(backbone, *family_samples.samples_of(backbone, *family_samples.ALL))
    with torch.no_grad():
        output = forward(model, backbone, dataclasses.replace(batch, padding_free=row), scores=True)
        found, tokens = output.token_losses()
    return (found / tokens).float(), model.config.get_text_config()._attn_implementation


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in family_traits.EVERY]
)
def test_auto_gives_the_losses_of_sdpa_where_flash_is_installed(tmp_path, family):
    folder = family_traits.write(tmp_path / "model", family)
    backbone = ENTRY(Options(folder), None)
    want, _ = losses(folder, "eager" if backbone.attentions == ("eager",) else "sdpa", False)
    installing.describe(tmp_path, "flash-attn", "2.8.3", "flash_attn")
    with installing.installed(installing.FLASH_2, tmp_path):
        for row in (False, True):
            found, used = losses(folder, "auto", row)
            torch.testing.assert_close(found, want, rtol=0, atol=0.03)
            assert used.startswith("flash") == (family not in NONE)


def test_flash_would_be_wrong_where_texts_look_ahead(tmp_path, monkeypatch):
    """The negative control: transformers leaves the mask out without a word."""
    folder = family_traits.write(tmp_path / "model", "paligemma")
    want, _ = losses(folder, "sdpa", False)
    installing.describe(tmp_path, "flash-attn", "2.8.3", "flash_attn")
    monkeypatch.setattr(ENTRY, "attentions", ())
    with installing.installed(installing.FLASH_2, tmp_path):
        found, _ = losses(folder, "flash_attention_2", False)
    assert (found - want).abs().max() > 0.3
