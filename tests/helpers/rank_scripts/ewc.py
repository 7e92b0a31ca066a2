"""Ranks of test_ewc_ranks.py: Fisher information and a few steps with elastic weight consolidation, case by case.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.ewc CASES.json OUT

Each case is {name, stage, ...}; rank 0 writes OUT/NAME.pt with what came out.
"""

import json
import sys
from pathlib import Path

import torch

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import ewc
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.runs import fisher
from tests.helpers import engine_state
from tests.helpers.rank_scripts.train import own_micro
from tests.helpers.runs import tiny_classifier

FISHER_STEPS, STEPS = range(30, 34), range(6)


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    recipe = tiny_classifier.make_recipe(folder, case["stage"], optim__accumulation=case.get("accumulation", 1))
    recipe.optim.ewc.file, recipe.optim.ewc.strength = str(folder / "earlier.safetensors"), case["strength"]
    recipe.optim.ewc.start = case.get("start", True)
    task = tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(recipe, task)
    built = build(resolved, ranks)
    state = TrainState()

    def steps(numbers):
        for number in numbers:
            micro = own_micro(tiny_classifier.global_slots(number, resolved.backbone), case, ranks)
            yield Step(0, number, [tiny_classifier.pack_slots(slots, resolved.backbone, task) for slots in micro])

    squares, facts = fisher.measure(Stepper(resolved, built, ranks, 10, TrainState(), BadBudget(1.0, 1000)),
                                    steps(FISHER_STEPS))  # fmt: skip
    mine = not gradients.replicated(built.engine)
    measured = {n: squares.whole(p, mine=mine).clone() for n, p in built.trainables.items()}
    before = {n: engine_state.read_weight(p) for n, p in built.trainables.items()}
    built.ewc = ewc.load(recipe, built, {}, state, fresh=True)
    started = {n: engine_state.read_weight(p) for n, p in built.trainables.items()}
    stepper = Stepper(resolved, built, ranks, 10, state, BadBudget(1.0, 1000))
    rows = [stepper.train_step(step, 0.0) for step in steps(STEPS)]
    after = {n: engine_state.read_weight(p) for n, p in built.trainables.items()}
    built.engine.destroy()
    return {"fisher": measured, "facts": facts, "before": before, "started": started, "rows": rows, "weights": after,
            "told": built.ewc.summary}  # fmt: skip


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
