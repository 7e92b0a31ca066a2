#!/usr/bin/env python
"""Effect of `engine.adapter_matmul: bfloat16` on the loss: a tiny LLaVA in bfloat16, every method that fits it.

    python benchmarks/adapter_products.py    ZeRO-1 and ZeRO-3 on 2 ranks; writes docs/benchmarks/adapter_products.*
    python benchmarks/adapter_products.py --steps 5 --methods lora

The same batches and seeds with products in float32 and in bfloat16. Beside the difference stands how far the losses of
three seeds lie apart, all in float32.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

METHODS = {
    "lora": {"r": 8},
    "adapter": {"r": 8},
    "uni_adapter": {"r": 8},
    "routed_lora": {"r": 8, "route": "mul"},
    "routed_adapter": {"r": 8, "route": "mul"},
    "graph_lora": {"r": 4},
    "p_adapter": {"r": 2},
    "deep_prompt": {"style": "prefix", "reparameterize": 16},
}
SEEDS = (0, 1, 2)
LAST = 5  # steps whose mean loss is compared


def cases(methods: list[str]) -> list[dict]:
    """One run each: method, ZeRO stage, dtype of the products, seed."""
    both = [
        {"method": m, "stage": stage, "products": products, "seed": SEEDS[0]}
        for m in methods
        for stage in (1, 3)
        for products in ("float32", "bfloat16")
    ]
    return both + [
        {"method": m, "stage": 1, "products": "float32", "seed": seed} for m in methods for seed in SEEDS[1:]
    ]


def train(case: dict, sections: dict, folder: Path, ranks: object, steps: int) -> float:
    """Mean loss of the last steps."""
    from mmpeft_ds.data.bad_budget import BadBudget
    from mmpeft_ds.data.stream import Step
    from mmpeft_ds.engine.assembly.build import build
    from mmpeft_ds.engine.step import Stepper
    from mmpeft_ds.engine.train_state import TrainState
    from tests.helpers.rank_scripts.pairs import mine
    from tests.helpers.runs import tiny_pairs

    method = {"name": case["method"], **METHODS[case["method"]]}
    setting = {"backbone": "mllm", "method": method, "stage": case["stage"], "dtype": "bfloat16"}
    parts = tiny_pairs.resolved({**setting, "adapter_matmul": case["products"]}, sections, folder)
    parts.recipe.seed = case["seed"]
    built = build(parts, ranks)
    stepper = Stepper(parts, built, ranks, steps, TrainState(), BadBudget(1.0, 1000))
    losses = []
    for step in range(steps):
        slots = mine(tiny_pairs.slots_of(step, parts.backbone), False, ranks)
        batch = tiny_pairs.packed(slots, parts.backbone, parts.train[0].task)
        losses.append(stepper.train_step(Step(0, step, [batch]), 0.0)["loss"])
    built.engine.destroy()
    return sum(losses[-LAST:]) / len(losses[-LAST:])


def worker(args: argparse.Namespace) -> None:
    """All cases one after the other, on one rank of two."""
    import torch

    from mmpeft_ds.distributed import processes

    ranks = processes.start(threads=1)
    folder = Path(args.worker)
    sections = json.loads((folder / "backbones.json").read_text())
    done = []
    for case in cases(args.methods):
        done.append({**case, "loss": train(case, sections, folder, ranks, args.steps)})
        if ranks.rank == 0:
            print(done[-1], flush=True)
            (folder / "result.json").write_text(json.dumps(done))
    torch.distributed.destroy_process_group()


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """The page: one row per method."""

    def loss(method: str, stage: int, products: str, seed: int = SEEDS[0]) -> float:
        key = {"method": method, "stage": stage, "products": products, "seed": seed}
        return next(row["loss"] for row in rows if key.items() <= row.items())

    lines = [
        "# Adapter products in bfloat16",
        "",
        f"Mean loss of the last {LAST} of {args.steps} steps: tiny LLaVA with random weights in bfloat16, 2 ranks, "
        f"8 samples per step, learning rate 0.005. {_page.machine()}. "
        "`python benchmarks/adapter_products.py` repeats it.",
        "",
        "| method | ZeRO-1, float32 | bfloat16 | difference | ZeRO-3, float32 | bfloat16 | difference "
        "| three seeds in float32 lie apart by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in args.methods:
        numbers = []
        for stage in (1, 3):
            full, half = loss(method, stage, "float32"), loss(method, stage, "bfloat16")
            numbers += [f"{full:.4f}", f"{half:.4f}", f"{half - full:+.4f}"]
        seeds = [loss(method, 1, "float32", seed) for seed in SEEDS]
        lines.append(f"| `{method}` | {' | '.join(numbers)} | {max(seeds) - min(seeds):.4f} |")
    return "\n".join(lines)


def main() -> None:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=_page.FOLDER)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args([a for a in sys.argv[1:] if not a.startswith("--local_rank")])
    if args.worker:
        return worker(args)
    from tests.helpers import launch
    from tests.helpers.runs import tiny_pairs

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "backbones.json").write_text(json.dumps(tiny_pairs.write_backbones(folder, {"mllm"})))
        command = [sys.executable, str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
        command += ["--master_port", str(launch.free_port()), __file__, "--worker", name]
        command += ["--steps", str(args.steps), "--methods", *args.methods]
        subprocess.run(command, check=True, env=launch.environment(), cwd=ROOT)
        rows = json.loads((folder / "result.json").read_text())
    _page.write("adapter_products", table(rows, args), {"steps": args.steps, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
