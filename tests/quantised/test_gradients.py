"""Gradients over a quantised base are those over a float32 base with the dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import quantised
from tests.helpers.models import tiny_mllm

pytestmark = quantised.needs_packages
QUICK = {("nf4", "lora"), ("nf4", "aurora"), ("int8", "routed_lora"), ("int8", "p_adapter"), ("fp8", "lora")}
PAIRS = [
    pytest.param(form, name, marks=() if (form, name) in QUICK else pytest.mark.slow)
    for form in quantised.FORMS
    for name in quantised.METHODS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantised")
    for family in ("llava", "qwen2_vl"):
        tiny_mllm.write(path / family, family)
    (path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    return path


@pytest.mark.parametrize(("form", "name"), PAIRS)
@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_dequantised_weights(folder, family, form, name):
    given = (folder, family, form, quantised.method(family, name))
    loss, found = quantised.gradients(*given, dequantised=False)
    same, wanted = quantised.gradients(*given, dequantised=True)
    share = quantised.TOLERANCE[form] * quantised.MAGNIFIED.get(name, 1)
    assert loss == pytest.approx(same, rel=1e-5)
    quantised.assert_equal_gradients(found, wanted, share)


def test_the_tolerance_tells_quantised_from_original_weights(folder):
    """Negative control: the gradients of the original weights are others."""
    given = (folder, "qwen2_vl", "fp8", quantised.METHODS["lora"])
    _, found = quantised.gradients(*given, dequantised=False)
    _, other = quantised.gradients(folder, "qwen2_vl", "int8", quantised.METHODS["lora"], dequantised=True)
    with pytest.raises(AssertionError):
        quantised.assert_equal_gradients(found, other, quantised.TOLERANCE["int8"])
