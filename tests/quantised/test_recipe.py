"""The commands of a recipe's header that train over a quantised base work in turn, in small."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from tests.helpers import ROOT, quantised
from tests.helpers.runs.headers import settings
from tests.helpers.runs.tiny_settings import carry_out

pytestmark = [quantised.needs_packages, pytest.mark.distributed, pytest.mark.slow]


def test_the_setting_of_a_header_over_4_bits_leads_from_the_layout_to_the_score(tmp_path):
    found = [s for s in settings(ROOT / "recipes" / "lora_qwen2vl_instruct.yaml") if str(s) == "lora_qwen2vl_nf4"]
    run = carry_out(found, tmp_path, tmp_path / "models")["lora_qwen2vl_nf4"]
    (report,) = json.loads((run / "evaluation-val.json").read_text())
    assert report["rows"] > 0 and report["bad_samples"] == 0
    assert json.loads((run / "adapter" / "backbone.json").read_text())["options"]["quantise"] == "nf4"
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all(".language_model." in name for name in file.keys())  # noqa: SIM118
