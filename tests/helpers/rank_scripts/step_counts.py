"""Ranks of tests/device: counts of the third step of a run, by the trainer's own step.

    deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.step_counts CASES.json OUT

Each case is {name, stage} of a tiny classifier or {name, recipe, overrides}; every rank writes OUT/NAME-RANK.json.
`together: false` leaves it to DeepSpeed how persistent parameters are gathered after a step, `sent: true` what rank 0
sends at the start; with `differs` rank 1 reads another base.
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.backbones.base import BackboneBase
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.assembly import build as building_module
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.assembly.resolve import resolve
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.streams import make_stream
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import stage3
from mmpeft_ds.errors import BadInput
from tests.helpers.device.counters import counted
from tests.helpers.device.counters_steps import STEPS
from tests.helpers.runs import tiny_classifier

BIAS = "text_model.encoder.layer.0.intermediate.dense.bias"


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    if "recipe" in case:
        resolved = resolve(recipes.load(case["recipe"], case.get("overrides")))
        stream = make_stream(resolved, resolved.train, ranks, train=True)
        steps = stream.epoch(0)
    else:
        recipe = tiny_classifier.make_recipe(folder, case["stage"])
        resolved = tiny_classifier.make_resolved(recipe, tiny_classifier.TinyTask())
        steps = tiny_steps(resolved, ranks)
    if case.get("differs"):
        other_base_on_rank_1(resolved.backbone, ranks)
    with counted() as building:
        try:
            built = build(resolved, ranks)
        except BadInput as problem:
            return {"problem": str(problem)}
    stepper = Stepper(resolved, built, ranks, 10, TrainState(), BadBudget(1.0, 1000))
    losses = []
    for step in itertools.islice(steps, STEPS):
        with counted() as counts:
            losses.append(stepper.train_step(step, 0.0)["loss"])
    assert len(losses) == STEPS
    run = folder / case["name"]
    run.mkdir(exist_ok=True)
    with counted() as saving:
        path = checkpoint.save(
            run,
            built.engine,
            built.trainables,
            stepper.state,
            recipe={},
            fingerprint={},
            keep_last=1,
        )
    with counted() as loading:
        checkpoint.load(path, built.engine, built.trainables)
    built.engine.destroy()
    if "recipe" in case:
        stream.close()
    return {
        "losses": losses,
        "kernels": counts.kernels,
        "reads": counts.reads,
        "collectives": counts.collectives,
        "trained_tensors": len(built.trainables),
        "tensors": len(list(built.model.parameters())),
        "building": building.collectives,
        "saving": saving.collectives,
        "loading": loading.collectives,
    }


def other_base_on_rank_1(backbone: BackboneBase, ranks: processes.Ranks) -> None:
    """Let rank 1 read another bias than the other ranks."""
    build_base = backbone.build

    def build_other() -> torch.nn.Module:
        model = build_base()
        model.get_parameter(BIAS).data += ranks.rank == 1
        return model

    backbone.build = build_other


def tiny_steps(resolved: Any, ranks: processes.Ranks) -> Iterator[Step]:
    """Steps of hand-made slots, two bad ones among them."""
    for step in range(STEPS):
        slots = tiny_classifier.global_slots(step, resolved.backbone)
        n, r = ranks.world_size, ranks.rank
        own = slots[r * len(slots) // n : (r + 1) * len(slots) // n]
        yield Step(0, step, [tiny_classifier.pack_slots(own, resolved.backbone, resolved.train[0].task)])


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    cases, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in cases:
        with contextlib.ExitStack() as stack:
            if not case.get("together", True):
                stack.enter_context(mock.patch.object(stage3, "gather_flat", lambda engine: None))
            if case.get("sent"):
                stack.enter_context(mock.patch.object(building_module, "frozen_not_sent", contextlib.nullcontext))
            result = run_case(case, out, ranks)
        (out / f"{case['name']}-{ranks.rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
