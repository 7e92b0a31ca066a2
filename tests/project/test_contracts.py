"""Hooks of components are asked of their base classes, which have a default for each: never with hasattr."""

import ast

import pytest
from torch import nn

from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.backbones.common.model_hooks import HasFrozenConstants, ModelHooks
from mmpeft_ds.data.transform import ImageTransform
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.head import Head
from mmpeft_ds.tasks.base import TaskBase
from tests.helpers import ROOT

CONTRACTS = (BackboneBase, ModelHooks, HasFrozenConstants, TaskBase, SiteMethod, Head, ImageTransform)
HOOKS = {name for contract in CONTRACTS for name in dir(contract) if not name.startswith("_")} - set(dir(object))
# Asked of other things than components: of files, of a component's module, of models of transformers.
ELSEWHERE = {
    ("mmpeft_ds/files.py", "read"),
    ("mmpeft_ds/registry.py", "Options"),
    ("mmpeft_ds/sites/observe.py", "config"),
}


def asked(code: str) -> set[str]:
    """Names that a source asks for with `hasattr`, or with `getattr` and a default."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            asks = node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
            if asks and isinstance(name, ast.Constant):
                found.add(name.value)
    return found


@pytest.mark.parametrize("folder", ["mmpeft_ds", "launchers", "data_prep", "benchmarks"])
def test_nobody_asks_whether_a_component_has_a_hook(folder):
    names = HOOKS - set(dir(nn.Module))  # such as `train`, which every module has
    wrong = {
        (path, name)
        for file in (ROOT / folder).rglob("*.py")
        for name in asked(file.read_text("utf-8")) & names
        if (path := str(file.relative_to(ROOT))) and (path, name) not in ELSEWHERE
    }
    assert not wrong


def test_the_check_sees_both_ways_of_asking():
    code = 'hasattr(task, "collect"); getattr(model, "head_modules", ()); getattr(part, "score"); hasattr(x, name)'
    assert asked(code) == {"collect", "head_modules"} and asked(code) <= HOOKS
