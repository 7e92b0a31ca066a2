"""Ranks of test_ds_keys_ranks.py: trains the same tiny model under one DeepSpeed JSON after the other in one launch.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.ds_keys CASES.json OUT

Each case is {name, config, recipe, looking}; rank 0 writes OUT/NAME.pt with what came out, or with the error.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.assembly import build as building
from mmpeft_ds.engine.export import trained_tensors
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import gradients
from mmpeft_ds.engine.zero import state as zero_state
from tests.helpers import engine_state
from tests.helpers.runs import tiny_classifier

BEFORE, AFTER = 3, 2


class Looking:
    """In place of EWC: notes where gradients and masters lie, and adds nothing."""

    def __init__(self, trainables: dict, engine):
        self.names = {id(p): n for n, p in trainables.items()}
        self.trainables, self.engine = trainables, engine
        self.seen: list[dict[str, float]] = []

    def add(self, shards) -> float:
        """Index-weighted sums of the gradient of each parameter, over ranks; masters must be what the forward uses."""
        sums = dict.fromkeys(self.trainables, 0.0)
        for shard in shards:
            n = len(shard.gradient)
            weights = torch.arange(shard.start + 1, shard.start + n + 1, dtype=torch.float64)
            if not gradients.replicated(self.engine):
                sums[self.names[id(shard.parameter)]] += float((weights * shard.gradient.double()).sum())
            if not hasattr(shard.parameter, "ds_tensor"):
                held = shard.parameter.detach().reshape(-1)[shard.start : shard.start + n]
                assert torch.equal(held, shard.master.detach().reshape(-1)), "a master of another parameter"
        total = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(total)
        self.seen.append(dict(zip(sums, total.tolist(), strict=True)))
        return 0.0


def make(case: dict, folder: Path, ranks: processes.Ranks) -> SimpleNamespace:
    recipe = tiny_classifier.make_recipe(folder, **case.get("recipe", {}))
    task = tiny_classifier.TinyTask()
    resolved = tiny_classifier.make_resolved(recipe, task)
    resolved.ds_config = {"zero_optimization": {"stage": 0}, **case["config"]}
    built = building.build(resolved, ranks)
    if case.get("looking", True):
        built.ewc = Looking(built.trainables, built.engine)
    return SimpleNamespace(recipe=recipe, task=task, resolved=resolved, built=built)


def train(made: SimpleNamespace, state: TrainState, steps: int, ranks: processes.Ranks) -> list[dict]:
    stepper = Stepper(made.resolved, made.built, ranks, 10, state, BadBudget(1.0, 1000))
    rows = []
    for _ in range(steps):
        slots = tiny_classifier.global_slots(state.step, made.resolved.backbone)
        own = slots[ranks.rank * len(slots) // ranks.world_size : (ranks.rank + 1) * len(slots) // ranks.world_size]
        batch = tiny_classifier.pack_slots(own, made.resolved.backbone, made.task)
        rows.append(stepper.train_step(Step(0, state.step, [batch]), 0.0))
    return rows


def weights_of(made: SimpleNamespace) -> dict[str, torch.Tensor]:
    zero_state.ensure_optimizer_state(made.built.engine)
    return {n: engine_state.read_weight(p) for n, p in made.built.trainables.items()}


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    made, state = make(case, folder, ranks), TrainState()
    rows = train(made, state, BEFORE, ranks)
    weights = weights_of(made)
    run = folder / case["name"]
    run.mkdir(exist_ok=True)
    path = checkpoint.save(
        run, made.built.engine, made.built.trainables, state, recipe={}, fingerprint={}, keep_last=1
    )
    exported = trained_tensors(made.built.model, made.built.engine)
    after = train(made, state, AFTER, ranks)
    seen = made.built.ewc.seen if made.built.ewc else []
    made.built.engine.destroy()
    again = make(case, folder, ranks)
    state = checkpoint.load(path, again.built.engine, again.built.trainables)
    resumed = train(again, state, AFTER, ranks)
    last = weights_of(again)
    again.built.engine.destroy()
    return {
        "rows": rows,
        "weights": weights,
        "gradients": seen,
        "after": after,
        "resumed": resumed,
        "last": last,
        "exported": exported,
    }


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    building.check_by_deepspeed = lambda recipe, config: None  # it refuses the keys that shall be seen to go wrong
    for case in cases:
        try:
            result = run_case(case, out, ranks)
        except Exception as error:  # noqa: BLE001 - some cases are there to fail, on all ranks alike
            result = {"error": f"{type(error).__name__}: {error}"}
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print("case done", case["name"], result.get("error", ""), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
