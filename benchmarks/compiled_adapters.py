#!/usr/bin/env python
"""Kernels of adapter arithmetic, forward and backward, counted before and after `engine.compile`; nothing is timed.

    python benchmarks/compiled_adapters.py                 writes docs/benchmarks/compiled_adapters.*
    python benchmarks/compiled_adapters.py --only aurora   prints these rows alone

A tiny BLIP for question answering, float32, on the CPU: the first call of every kind of module that a method has
compiled. Before: torch's operations that make a tensor, views left out. After: kernels that inductor generates, and
calls of a library (matrix products). A GPU launches about as many, but fuses along other lines than a CPU.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

METHODS = [
    "adapter", "aurora", "bitfit", "deep_prompt", "graph_lora", "layer_norm", "p_adapter", "routed_adapter",
    "routed_lora", "uni_adapter",
]  # fmt: skip


def rows_of(name: str, column: Any) -> Iterator[dict]:
    """One row for each kind of compiled module of a method."""
    from tests.helpers.compiled_methods import attached

    model = attached(name, column)
    for kind, (module, args) in first_calls(model, column).items():
        kept = copy.deepcopy((module, args))
        eager, operations = run(*kept, count_operations)
        fused, kernels = run(*copy.deepcopy((module, args)), count_kernels)
        yield {"method": name, "module": kind, "before": operations} | kernels | differences(eager, fused)


def first_calls(model: Any, column: Any) -> dict[str, tuple[Any, tuple]]:
    """What every kind of module that can be compiled was first called with, as a function and its arguments."""
    from mmpeft_ds.methods.common.fused import Fusable, FusablePart
    from tests.helpers.method_table import say

    calls: dict[str, tuple[Any, tuple]] = {}
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, Fusable):
            module.register_forward_pre_hook(lambda m, args, kind=kind: calls.setdefault(kind, (m, args)) and None)
        elif isinstance(module, FusablePart):

            def noted(*args, kind=kind, function=module.arithmetic):
                calls.setdefault(kind, (function, args))
                return function(*args)

            module.arithmetic = noted
    say(column.backbone, model, column.batch)
    calls = {kind: (made, _cut(args)) for kind, (made, args) in calls.items()}
    for made, _ in calls.values():
        getattr(made, "_forward_pre_hooks", {}).clear()
    return calls


def _cut(args: tuple) -> tuple:
    """The same arguments, whose floating-point tensors are leaves with a gradient."""
    import torch

    floating = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return tuple(x.detach().requires_grad_() if floating(x) else x for x in args)


def run(function: Any, args: tuple, count: Callable) -> tuple[list, Any]:
    """Results and gradients of one call, and what `count` counted."""
    import torch

    leaves = [p for x in (function, *args) if isinstance(x, torch.nn.Module) for p in x.parameters()]
    leaves += [x for x in args if isinstance(x, torch.Tensor)]

    def step(function: Any) -> list:
        out = function(*args)
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        torch.autograd.backward(outs, [torch.linspace(-1, 1, x.numel()).view_as(x) for x in outs])
        return [x.detach() for x in outs] + [x.grad for x in leaves if x.grad is not None]

    return count(function, step)


def count_operations(function: Any, step: Callable[[Any], list]) -> tuple[list, int]:
    """Operations of torch that make a tensor, without those of the gradient that `step` hands in."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found = [0]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found[0] += not func.is_view and func._schema.name not in FREE
            return func(*args, **(kwargs or {}))

    with Count():
        return step(function), found[0]


FREE = {
    "aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::linspace", "aten::_unsafe_view",
    "aten::view",
}  # fmt: skip


def count_kernels(function: Any, step: Callable[[Any], list]) -> tuple[list, dict[str, int]]:
    """Kernels that inductor generates, and its calls of a library."""
    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import metrics
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    with fresh_cache():
        made = step(torch.compile(function, fullgraph=True))
    return made, {"generated": metrics.generated_kernel_count, "library": counters["inductor"]["extern_calls"]}


def differences(eager: list, fused: list) -> dict[str, float]:
    """The largest difference of a result or gradient, against the largest entry of that tensor."""
    assert len(eager) == len(fused)
    shares = []
    for a, b in zip(eager, fused, strict=True):
        largest, apart = a.abs().max().item(), (a - b).abs().max().item()
        shares.append(apart / largest if largest else (0.0 if apart == 0 else float("inf")))
    return {"difference": max(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of page and JSON")
    parser.add_argument("--only", choices=METHODS, help="count this method alone, and write nothing")
    args = parser.parse_args()
    from tests.helpers.method_table import Column

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        column = Column.make("blip vqa", Path(folder))
        for name in [args.only] if args.only else METHODS:
            for row in rows_of(name, column):
                print(json.dumps(row), flush=True)
                rows.append(row)
    if not args.only:
        result = {"machine": _page.machine(), "rows": rows}
        _page.write("compiled_adapters", _table(result), result, args.out)


def _table(result: dict) -> str:
    lines = [
        "# Kernels of compiled adapters, by count",
        "",
        "Forward and backward of one call, tiny BLIP for question answering, float32 on a CPU; nothing is a time.",
        "Before: operations of torch that make a tensor. After: kernels that inductor generates, and calls of a",
        "library (matrix products). The difference is the largest of results and gradients, against the largest entry",
        f"of each tensor. {result['machine']}. `python benchmarks/compiled_adapters.py` repeats it.",
        "",
        "| method | compiled | before | after: generated + library | difference |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r['method']}` | {r['module']} | {r['before']} | {r['generated']} + {r['library']} "
        f"| {r['difference']:.1e} |"
        for r in result["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
