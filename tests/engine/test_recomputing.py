"""`engine.gradient_checkpointing` on every backbone: blocks run again in backward, and the gradients stay."""

import copy
from collections import Counter

import pytest
import torch

from mmpeft_ds.engine.assembly.build import recompute_blocks
from mmpeft_ds.engine.zero.stage3 import block_paths
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common import fused
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.base import base_model
from tests.helpers import compiled_methods, method_table


def recomputing(plain):
    """A copy that recomputes its blocks, and how often each part of them runs."""
    model = copy.deepcopy(plain)
    base = base_model(model)
    recompute_blocks(base)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.eval()
    runs = Counter()
    for path in block_paths(find_sites(base)):
        for part in base.get_submodule(path).children():
            part.register_forward_pre_hook(lambda module, _: runs.update([module]))
    return model, runs


def check(plain, column, **options):
    model, runs = recomputing(plain)
    if options:
        torch._dynamo.reset()
        fused.fuse(model, **options)
    expected, found = compiled_methods.outcome(plain, column), compiled_methods.outcome(model, column)
    assert any(times >= 2 for times in runs.values())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", method_table.COLUMNS)
def test_a_backbone_that_recomputes_gives_the_gradients_of_one_that_keeps_its_activations(name, tmp_path):
    column = method_table.Column.make(name, tmp_path)
    check(compiled_methods.attached("lora", column), column)


def test_compiled_adapters_are_recomputed_with_their_block(tmp_path):
    column = method_table.Column.make("blip vqa", tmp_path)
    for method in ("routed_lora", "adapter"):
        check(compiled_methods.attached(method, column), column, backend="aot_eager")


def test_a_model_without_blocks_is_refused_in_one_line():
    class Plain(torch.nn.Module):
        def _set_gradient_checkpointing(self, enable, function):
            raise ValueError("Plain is not compatible with gradient checkpointing.")

    with pytest.raises(BadInput, match="engine.gradient_checkpointing: Plain has no blocks .* Set .*: false"):
        recompute_blocks(Plain())
