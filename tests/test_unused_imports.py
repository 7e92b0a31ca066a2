"""The compiler of torch and its symbolic shapes stay out of a process until somebody uses them."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from mmpeft_ds import unused_imports
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

REAL = ("torch._dynamo.eval_frame", "sympy.core")  # modules that only the real ones import
BEGIN = """
import sys
from mmpeft_ds import console, unused_imports
with console.quick_imports():
    import torch
def real(name):
    return not isinstance(sys.modules.get(name), (type(None), unused_imports._StandIn))
"""


def says(body: str) -> list[str]:
    """What `body` prints in a process of its own that has imported torch as commands do."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + body], cwd=ROOT, env=launch.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_libraries_are_imported_and_an_optimizer_steps_without_the_compiler():
    said = says(
        "import transformers.modeling_utils, transformers.masking_utils, peft, deepspeed\n"
        "p = torch.nn.Parameter(torch.ones(2)); p.grad = p.detach()\n"
        "torch.optim.AdamW([p], lr=0.5, weight_decay=0.0).step()\n"
        "with torch.device('meta'): torch.randn(4, 3) + torch.nn.Linear(2, 3).bias\n"
        f"print(*[real(name) for name in {REAL!r}], round(p[0].item(), 4))"
    )
    assert said[-3:] == ["False", "False", "0.5"]  # after what DeepSpeed prints of its accelerator


def test_what_is_compiled_brings_the_compiler_which_learns_what_it_was_told_before():
    assert says(
        "import torch._dynamo\n"
        "before = torch.compile\n"
        "kept = torch._dynamo.disable(lambda x: x + 1)\n"
        "@torch._dynamo.assume_constant_result\n"
        "def two(): return 2\n"
        "double = torch.compile(lambda x: kept(x) * two(), backend='eager')\n"
        "print(real('torch._dynamo'), kept(torch.ones(1)).item(), real('torch._dynamo'))\n"
        "print(double(torch.ones(1)).item(), real('torch._dynamo'), torch.compile is before)\n"
        "print(two._dynamo_marked_constant, torch._dynamo is sys.modules['torch._dynamo'])\n"
        "print(kept(torch.ones(1)).item(), torch._dynamo.utils.counters['frames']['total'] > 0)"
    ) == ["False", "2.0", "False", "4.0", "True", "False", "True", "True", "2.0", "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "use",
    [
        "import torch._dynamo; torch._dynamo.config",
        "from torch._dynamo import is_compiling",
        "import torch._dynamo.utils",
        "from torch._dynamo.eval_frame import OptimizedModule",
        "from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex as T; T()",
        "import torch._dynamo.trace_rules as t; t.lookup_callable",
    ],
)
def test_any_other_use_gets_the_real_module(use):
    body = f"{use}\nimport torch._dynamo.eval_frame as e, torch._dynamo as d\n"
    body += "print(real('torch._dynamo'), d.eval_frame is e, torch._dynamo is d, e.__spec__.loader is not None)"
    assert says(body) == ["True"] * 4


def test_a_module_that_took_the_exception_of_the_stand_in_has_the_real_one_afterwards():
    assert says(
        "import torch.distributed.tensor._decompositions as d\n"
        "taken = d.GuardOnDataDependentSymNode\n"
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv, GuardOnDataDependentSymNode as real_one\n"
        "print(d.GuardOnDataDependentSymNode is real_one, taken is real_one)"
    ) == ["True", "False"]


@pytest.mark.parametrize(("compiles", "asked"), [(True, "0"), (False, "1")])
def test_a_process_that_compiles_or_is_told_to_has_no_stand_ins(compiles, asked):
    """Libraries then import the compiler where they want it. That there are some otherwise is said above."""
    body = BEGIN.replace("quick_imports()", f"quick_imports(compiles={compiles})")
    body += "print([n for n, module in sys.modules.items() if isinstance(module, unused_imports._StandIn)])"
    env = launch.environment() | {"MMPEFT_REAL_IMPORTS": asked}
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout.split() == [b"[]"], done.stderr


def test_stand_ins_answer_plain_values_as_torch_does():
    from torch.fx.experimental import symbolic_shapes

    plain = {
        unused_imports._guard: [(True,), (False,)],
        unused_imports._nested: [(3,)],
        unused_imports._joined: [(True, False), (False, False), (True, True, True), (False,)],
        unused_imports._equal: [((1, 2), [1, 2]), ((1,), (1, 2)), ([1, 3], [1, 2]), ((), ())],
    }
    compared = 0
    for name, make in unused_imports.MEMBERS[unused_imports.SHAPES].items():
        for values in plain.get(make, []):
            theirs = getattr(symbolic_shapes, name)(*values)
            assert make(unused_imports.SHAPES, name)(*values) is theirs, (name, values)
            compared += 1
    assert compared > 15


@pytest.mark.skipif(torch.accelerator.current_accelerator() is not None, reason="torch is built for an accelerator")
def test_deepspeed_learns_that_no_gpu_is_there_without_triton():
    asks = (
        "import deepspeed.module_inject.auto_ep_layer\n"  # as DeepSpeedEngine does
        "from deepspeed.ops.triton_ops import _TRITON_AVAILABLE, is_triton_available\n"
        "print(_TRITON_AVAILABLE, is_triton_available(), deepspeed.HAS_TRITON, 'triton' in sys.modules)\n"
    )
    assert says(asks)[-4:] == ["False"] * 4
    stock = "import sys, torch\n" + asks
    done = subprocess.run(
        [sys.executable, "-c", stock], cwd=ROOT, env=launch.environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-4:] == ["False", "False", "False", "True"]  # the same answers, for 67 MiB
    assert says("from deepspeed.ops.triton_ops._triton import backends\nprint(bool(backends))")[-1] == "True"


def test_every_member_of_a_stand_in_is_one_of_the_real_module():
    import importlib

    for module, members in unused_imports.MEMBERS.items():
        assert not [name for name in members if not hasattr(importlib.import_module(module), name)]


WRITE_MODULES = """
import atexit, os, sys

@atexit.register
def write():
    if "mmpeft_ds.engine.trainer" in sys.modules and "RANK" in os.environ:
        with open(os.environ["MODULES"] + os.environ["RANK"], "w") as file:
            file.write("\\n".join(sys.modules))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_ends_without_the_compiler_and_has_the_losses_of_one_with_it(tmp_path):
    tiny_vqa.prepare(tmp_path)
    (tmp_path / "sitecustomize.py").write_text(WRITE_MODULES)
    losses = {}
    for stage, with_it in itertools.product((1, 3), (False, True)):
        name = f"{stage}{with_it}"
        env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "MODULES": str(tmp_path / name)}
        changes = [f"run_dir={tmp_path / ('run' + name)}", f"engine.deepspeed=ds_configs/zero{stage}.json"]
        changes += ["optim.max_steps=3", *(["engine.compile=true"] if with_it and stage == 1 else [])]
        command = [str(arg) for change in changes for arg in ("--set", change)]
        if with_it and stage == 3:  # where nothing can be compiled; the modules are imported all the same
            (tmp_path / "sitecustomize.py").write_text("import torch._dynamo\n" + WRITE_MODULES)
        script = ROOT / "launchers" / "train.py"
        with launch.Launch(script, "--recipe", str(tmp_path / "recipe.yaml"), *command, env=env) as run:
            result = run.wait(240)
        assert result.code == 0, result.tail()
        lines = (tmp_path / f"run{name}" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
        for rank in "01":
            modules = set((tmp_path / (name + rank)).read_text().split("\n"))
            assert [module in modules for module in REAL] == [with_it] * 2, (name, sorted(modules))
    assert losses["3False"] == losses["3True"] and len(losses["3False"]) == 3
    assert losses["1False"] == pytest.approx(losses["1True"], abs=1e-6)
