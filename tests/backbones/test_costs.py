"""Costs of tokens, patches and pairs of them are those of the operations that a step really does."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.engine.assembly.forward import forward
from tests.helpers.models import family_samples, tiny_families
from tests.helpers.packs import packed

SAMPLES = {
    "short": ([(16, 16)], [Prompted("what ?", "red")]),
    "long": ([(16, 16)], [Prompted("what is this ? " * 60, "red")]),
    "text": ([], [Prompted("is this blue ? " * 30, "red")]),
    "large": ([(32, 32)], [Prompted("what ?", "red")]),
    "two": ([(32, 16), (16, 32)], [Prompted("what ?", "red"), Prompted("is it ?", "no")]),
}


def operations(backbone, model, sample) -> int:
    def image(size):
        return torch.zeros(3, *size, dtype=torch.uint8)

    batch = dataclasses.replace(packed(backbone, image, [sample]), padding_free=True)
    with FlopCounterMode(display=False) as counter:
        forward(model, backbone, batch, scores=True).token_losses()[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3"])
def test_costs_follow_the_operations_of_forward_and_backward(tmp_path, family):
    backbone = ENTRY(Options(tiny_families.write(tmp_path, family), max_text_length=600), None)
    backbone.attention = "eager"
    backbone.check()
    model = family_samples.attached("lora", backbone, backbone.build())
    done, costs = [], []
    for sizes, texts in SAMPLES.values():
        counts = backbone.tokens([t.with_images(len(sizes)) for t in texts], sizes)
        # eager attention computes what a mask hides too: later tokens, and those of other texts
        counted = counts._replace(pairs=2 * counts.tokens**2)
        costs.append(float(backbone.costs(TokenCounts(*(torch.tensor([n]) for n in counted)))))
        done.append(operations(backbone, model, (sizes, texts)))
    ratios = [d / c for d, c in zip(done, costs, strict=True)]
    assert max(done) > 5 * min(done) and max(ratios) < 1.25 * min(ratios), ratios
