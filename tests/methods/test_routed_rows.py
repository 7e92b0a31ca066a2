"""The routed bottleneck where all texts stand in one row: each is routed on the condition of its own."""

import pytest
import torch

from mmpeft_ds import RoutedLoraConfig
from mmpeft_ds.methods.common.routed import Bottleneck
from mmpeft_ds.sites.condition import Condition, Segments, conditioned

LENGTHS, TOKENS, WIDTH = (4, 1, 3), 5, 12


def segments() -> Segments:
    text = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    return Segments(text, torch.cat([torch.arange(n) for n in LENGTHS]), LENGTHS)


@pytest.mark.parametrize("variant", ["plain", "split", "split_merge_ln", "cross_attention"])
@pytest.mark.parametrize("route", ["mul", "matmul1", "matmul1_relu", "ones"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_row_of_all_texts_is_routed_as_a_row_for_each(variant, route, tokens):
    if route == "mul" and tokens > 1:
        pytest.skip("takes one token, or as many as the text has")
    torch.manual_seed(0)
    config = RoutedLoraConfig(r=16, route=route, variant=variant, heads=1)
    bottleneck = Bottleneck(config, WIDTH, torch.empty(0, dtype=torch.float64))
    bottleneck.reset_bottleneck(0.5)
    where, row = segments(), torch.randn(1, sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, tokens, WIDTH, dtype=torch.float64)
    mask = torch.arange(tokens) < torch.tensor([1, tokens, 2])[:, None]
    padded = where.join(bottleneck.bottleneck(where.split(row), y, mask, 0.5))
    with conditioned(Condition(y, mask, segments=where)):
        together = bottleneck.bottleneck(row, y, mask, 0.5)
    torch.testing.assert_close(together, padded)
    (want,) = torch.autograd.grad(padded.square().sum(), row, retain_graph=True)
    (found,) = torch.autograd.grad(together.square().sum(), row)
    torch.testing.assert_close(found, want)
    if route != "ones":  # whose condition a LayerNorm takes away again
        with conditioned(Condition(y.flip(0), mask, segments=where)):
            other = bottleneck.bottleneck(row, y.flip(0), mask, 0.5)
        assert not torch.allclose(other, together)  # which text has which condition matters
