"""Which packages of flash attention are taken for which implementation."""

from __future__ import annotations

import pytest
import torch
import transformers

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.errors import BadInput
from tests.helpers.device import installing
from tests.helpers.models import tiny_backbones


def test_a_package_of_flash_attn_4_alone_is_not_taken_for_2(tmp_path):
    installing.describe(tmp_path, "flash-attn-4", "4.0.0b36", "flash_attn")
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("flash_attn_func = flash_attn_varlen_func = None\n")
    backbone = tiny_backbones.make_mllm(tmp_path / "model")
    with installing.installed(tmp_path):
        assert transformers.utils.is_flash_attn_4_available(), "else nothing is shown"
        assert tower_loading.choose_attention("auto", torch.bfloat16) == "sdpa"
        with pytest.raises(BadInput, match="flash_attention_2.*not installed"):
            resolve.attention_of("flash_attention_2", "mllm", backbone, observed=False)
    assert not transformers.utils.is_flash_attn_4_available(), "the test leaves something behind"


def test_flash_attn_2_is_taken_for_a_base_in_half_precision_alone(tmp_path):
    assert tower_loading.choose_attention("auto", torch.bfloat16) == "sdpa"
    installing.describe(tmp_path, "flash-attn", "2.8.3", "flash_attn")
    with installing.installed(installing.FLASH_2, tmp_path):
        assert tower_loading.choose_attention("auto", torch.bfloat16) == "flash_attention_2"
        assert tower_loading.choose_attention("auto", torch.float32) == "sdpa"
    assert tower_loading.choose_attention("auto", torch.bfloat16) == "sdpa"
