"""Ranks of test_train_ranks.py: trains the cases of a JSON file one after the other in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.train CASES.json OUT

Each case is {name, stage, accumulation, split, poison, dtype, ...}; rank 0 writes OUT/NAME.pt with what came out.
"""

import json
import sys
from pathlib import Path

import torch

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.evaluator import evaluate
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import state as zero_state
from tests.helpers import engine_state
from tests.helpers.runs import tiny_classifier


def own_micro(slots: list, case: dict, ranks: processes.Ranks) -> list[list]:
    """This rank's slots of a step, cut into micro-batches. `skew`: rank 0 gets all slots with images."""
    if case.get("split") == "skew":
        with_images = [s for s in slots if s.images]
        rest = [s for s in slots if not s.images]
        parts = [with_images, rest] + [[] for _ in range(ranks.world_size - 2)]
    elif case.get("split") == "one":  # the other ranks have nothing at all
        parts = [slots] + [[] for _ in range(ranks.world_size - 1)]
    else:
        parts = [slots[r * len(slots) // ranks.world_size : (r + 1) * len(slots) // ranks.world_size]
                 for r in range(ranks.world_size)]  # fmt: skip
    mine, a = parts[ranks.rank], case.get("accumulation", 1)
    return [mine[i * len(mine) // a : (i + 1) * len(mine) // a] for i in range(a)]


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    recipe = tiny_classifier.make_recipe(
        folder,
        case["stage"],
        optim__accumulation=case.get("accumulation", 1),
        engine__dtype=case.get("dtype", "float32"),
        engine__gradient_checkpointing=case.get("gradient_checkpointing", False),
        engine__max_skipped=case.get("max_skipped", 5),
    )
    task = tiny_classifier.TinyTask(poison=set(case.get("poison", [])))
    resolved = tiny_classifier.make_resolved(recipe, task)
    built = build(resolved, ranks)
    state = TrainState()
    stepper = Stepper(resolved, built, ranks, 10, state, BadBudget(1.0, 1000))
    rows = []
    for step in range(case.get("steps", 10)):
        micro = own_micro(tiny_classifier.global_slots(step, resolved.backbone), case, ranks)
        packed = [tiny_classifier.pack_slots(slots, resolved.backbone, task) for slots in micro]
        rows.append(stepper.train_step(Step(0, step, packed), 0.0))
    result = None
    if case.get("evaluate"):
        parts = [own_micro(tiny_classifier.global_slots(s, resolved.backbone), case, ranks) for s in (20, 21)]
        steps = [
            Step(0, 0, [tiny_classifier.pack_slots(m, resolved.backbone, task) for m in micro]) for micro in parts
        ]
        result = vars(evaluate(built.engine, resolved.backbone, task, steps, ranks.device, pictures=3))
    weights = {}
    zero_state.ensure_optimizer_state(built.engine)
    for name, parameter in built.trainables.items():
        weights[name] = engine_state.read_full(built.engine, parameter)["weight"]
    dtypes = sorted({str(p.dtype) for p in built.model.parameters() if not p.requires_grad})
    built.engine.destroy()
    return {
        "rows": rows,
        "weights": weights,
        "frozen_dtypes": dtypes,
        "bad": state.bad,
        "state": vars(state),
        "evaluation": result,
    }


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        result = run_case(case, out, ranks)
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print("case done", case["name"], flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
