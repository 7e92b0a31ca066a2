"""Every backbone with the option `quantise`: LoRA over its quantised base trains as over the dequantised weights."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from mmpeft_ds import methods
from mmpeft_ds.backbones.common import quantised as quantising
from mmpeft_ds.sites import find_sites
from tests.helpers import method_table, quantised

# transformers' Linear is quantised as it is read, GPT-2's Conv1D afterwards where torchao does it
COLUMNS = [
    name
    for name in method_table.COLUMNS
    if name.split(" ")[0] in ("clip", "blip", "mllm") or name.startswith("vision_")
]
QUICK = {("nf4", "vision_text_decoder"), ("int8", "vision_text_decoder"), ("int8", "clip")}
PAIRS = [
    pytest.param(form, name, marks=() if (form, name) in QUICK else pytest.mark.slow)
    for form in quantised.FORMS
    for name in COLUMNS
]
pytestmark = quantised.needs_packages


def gradients(base, backbone, batch) -> dict[str, torch.Tensor | None]:
    method = methods.get("lora")
    torch.manual_seed(2)
    model = peft.get_peft_model(base, method.prepare(method.Config(r=2), base, find_sites(base))).eval()
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in quantised.trained(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    said = method_table.say(backbone, model, batch).float()
    # Not the sum of squares, which is the same for all vectors of length 1: its gradients would be rounding alone.
    (said * torch.randn(said.shape, generator=noise)).mean().backward()
    return {name: p.grad for name, p in quantised.trained(model).items() if "lora_" in name}


def test_there_are_such_backbones():
    assert {"vision_text_encoder", "vision_text_decoder", "clip", "blip vqa", "mllm LLaVA"} <= set(COLUMNS)


@pytest.mark.parametrize(("form", "name"), PAIRS)
def test_lora_trains_as_over_the_dequantised_weights(tmp_path, form, name):
    column = method_table.Column.make(name, tmp_path)
    backbone = copy.copy(column.backbone)
    backbone.options = copy.copy(backbone.options)
    backbone.options.quantise = form
    base = backbone.build().eval()
    layers = sum(map(quantising.is_quantised, base.modules()))
    assert layers == len(list(quantising.linear_layers(column.model))) >= 8
    with torch.device("meta"):
        on_meta = backbone.build(on_meta=True)
    assert sum(map(quantising.nbytes, on_meta.parameters())) == sum(map(quantising.nbytes, base.parameters()))
    plain = quantising.dequantise(backbone.build().eval())
    found, wanted = (gradients(m, backbone, column.batch) for m in (base, plain))
    assert max(float(grad.abs().max()) for grad in wanted.values() if grad is not None) > 1e-4, "no rounding"
    quantised.assert_equal_gradients(found, wanted, 10 * quantised.TOLERANCE[form])
