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
from tests.helpers.compiled_methods import METHODS, attached, in_double, outcome


@pytest.fixture(scope="module")
def column(tmp_path_factory):
    """In float64: some gradients, such as those of `graph_lora`'s gates, are small sums of large numbers."""
    return in_double(method_table.Column.make("blip vqa", Path(tmp_path_factory.mktemp("blip"))))


SLOW = {"aurora", "deep_prompt", "graph_lora", "tens_lora"}  # 3 to 8 s of processor time each, others below 1 s


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in METHODS])
def test_a_compiled_adapter_is_one_graph_and_equals_the_uncompiled_one(name, column):
    check(*both(name, column, "aot_eager"), column)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_compiled_to_machine_code_it_equals_the_uncompiled_one(name, column):
    check(*both(name, column, "inductor", layers=[0]), column)


def both(name, column, backend, **options):
    """A model as it is, and a copy of it with compiled adapters."""
    plain = attached(name, column, **options)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    assert fused.fuse(compiled, backend) > 0
    return plain, compiled


def check(plain, compiled, column):
    expected, found = outcome(plain, column), outcome(compiled, column)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    assert found[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        largest = gradient.abs().max().item()
        apart = (found[1][key] - gradient).abs().max().item()
        if ".key.bitfit_bias." in key or key.endswith(".attention_bias"):
            # It moves all scores of a query, or of a node, alike, so what is there of a gradient is rounding.
            assert max(largest, apart) < 1e-6, key
        else:
            assert apart <= GRADIENT * largest, (key, apart, largest)


GRADIENT = 1e-9  # of a tensor's largest entry


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
