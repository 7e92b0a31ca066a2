"""Compiled adapters: each is one graph without a break, and gives what the uncompiled one gives.

The graphs are captured and differentiated as for every compiler, but run by torch's own kernels: no C++ compiler is
needed, and a slow test has them compiled.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mmpeft_ds import methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common import fused
from tests.helpers import method_table

METHODS = ["aurora", "bitfit", "graph_lora", "p_adapter", "routed_adapter", "routed_lora"]


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    return method_table.Column.make("blip vqa", Path(tmp_path_factory.mktemp("blip")))


def attached(name, column):
    tower = {} if name in ("aurora", "lora") else {"tower": ["text_decoder.bert"]}
    model = method_table._attach(name, column, tower)
    with torch.no_grad():  # `up` starts at zero
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter += 0.05 * noise
    return model.eval()


def outcome(model, column):
    said = method_table.say(column.backbone, model, column.batch)
    said.float().square().mean().backward()
    return said.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_adapter_is_one_graph_and_equals_the_uncompiled_one(name, column):
    check(name, column, "aot_eager")


def check(name, column, backend):
    plain = attached(name, column)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    assert fused.fuse(compiled, backend) > 0
    expected, found = outcome(plain, column), outcome(compiled, column)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        # float32 sums in another order: against the largest entry, not each small one
        largest = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aurora", "routed_lora"])
def test_compiled_to_machine_code_it_equals_the_uncompiled_one(name, column):
    fused.check_compiler()
    check(name, column, "inductor")


def test_a_graph_break_is_seen(column, monkeypatch):
    """Control: an adapter that leaves the graph fails instead of running in pieces."""
    model = attached("aurora", column)
    kind = next(type(m) for m in model.modules() if isinstance(m, fused.Fusable))
    right = kind.forward

    def breaking(self, x):
        torch._dynamo.graph_break()
        return right(self, x)

    monkeypatch.setattr(kind, "forward", breaking)
    torch._dynamo.reset()
    fused.fuse(model, "aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        outcome(model, column)


def test_a_method_without_arithmetic_of_its_own_is_refused(column):
    assert "lora" in methods.names(heads=False)
    with pytest.raises(BadInput, match="engine.compile: .* aurora"):
        fused.fuse(attached("lora", column), "aot_eager")


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BadInput, match="needs a C.. compiler, and no-such-compiler is not to be found"):
        fused.check_compiler()
