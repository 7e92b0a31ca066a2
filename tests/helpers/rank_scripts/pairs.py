"""Ranks of test_pairs_ranks.py: trains pairs of method and backbone one after the other in one launch.

deepspeed --num_accelerators 2 --module tests.helpers.rank_scripts.pairs CASES.json OUT [RANKS_PER_MACHINE]
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine import checkpoint
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.assembly.build import Built, build
from mmpeft_ds.engine.assembly.forward import forward, scored_layer
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero import stage3
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.ops import token_scores
from mmpeft_ds.sites.condition import enable_checkpointing
from tests.helpers import engine_state
from tests.helpers.runs import tiny_pairs


def mine(slots: list, skew: bool, ranks: processes.Ranks) -> list:
    """This rank's slots of a step; with `skew` rank 0 has all slots with an image and the others none."""
    if skew:
        return [s for s in slots if bool(s.images) == (ranks.rank == 0)] if ranks.rank < 2 else []
    each = len(slots) // ranks.world_size
    return slots[ranks.rank * each : (ranks.rank + 1) * each]


def run_case(case: dict, sections: dict, folder: Path, ranks: processes.Ranks) -> dict:
    parts = tiny_pairs.resolved(case, sections, folder)
    built = build(parts, ranks)
    if case.get("reentrant"):
        enable_checkpointing(built.model.get_base_model(), use_reentrant=True)
    stepper = Stepper(parts, built, ranks, tiny_pairs.STEPS, TrainState(), BadBudget(1.0, 1000))
    rows, gathers = [], []
    head = scored_layer(parts.backbone, built.model.get_base_model())
    gathered = gathers_of(built.model, head) if head is not None and hasattr(head.weight, "ds_id") else []
    for step in range(tiny_pairs.STEPS):
        slots = mine(tiny_pairs.slots_of(step, parts.backbone), case.get("skew", False), ranks)
        batch = tiny_pairs.packed(slots, parts.backbone, parts.train[0].task)
        gathered.clear()
        with Reductions() as reductions:
            rows.append(stepper.train_step(Step(0, step, [batch]), 0.0))
        gathers.append(len(gathered))
        if step == tiny_pairs.STEPS // 2:
            # Without the trainer every rank must run the same towers, so only where each has an image.
            look(built, parts, batch if ranks.world_size == 2 and not case.get("skew") else None, ranks)
        if step == tiny_pairs.STEPS // 2 and case.get("back"):
            go_and_come_back(stepper, built, parts, batch, folder / case["name"], ranks)
    zero_state.ensure_optimizer_state(built.engine)
    frozen = [p for p in built.model.parameters() if not p.requires_grad]
    copies = sum(getattr(p, "ds_secondary_tensor", None) is not None for p in frozen)
    weights = {n: engine_state.read_full(built.engine, p)["weight"] for n, p in built.trainables.items()}
    built.engine.destroy()
    norms = [r["grad_norm"] for r in rows]
    return {
        "losses": [r["loss"] for r in rows],
        "norms": norms,
        "weights": weights,
        "copies": copies / len(frozen),
        "scored": head is not None,
        "gathers": gathers,
        "reduced": reductions.dtypes,
    }


class Reductions(TorchDispatchMode):
    """Dtypes of the tensors that ranks add up and share out."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if "reduce_scatter" in str(func):
            leaves = torch.utils._pytree.tree_leaves(args)
            self.dtypes |= {x.dtype for x in leaves if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def gathers_of(model: torch.nn.Module, head: torch.nn.Linear) -> list:
    """Gets an element for each all-gather of the weight of `head`; the other parameters travel with it or apart."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    gathered, number = [], head.weight.ds_id
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):

            def counted(params: list, *args: Any, gather: Any = parameter.all_gather_coalesced, **kwargs: Any) -> Any:
                gathered.extend(p for p in params if p.ds_id == number and p.ds_status != ZeroParamStatus.AVAILABLE)
                return gather(params, *args, **kwargs)

            parameter.all_gather_coalesced = counted
    return gathered


def look(built: Built, parts: SimpleNamespace, batch: Any, ranks: processes.Ranks) -> None:
    """What an evaluation and a checkpoint do in the middle of a run, which must not show afterwards."""
    if batch is not None:
        training = [m for m in built.model.modules() if m.training]
        built.engine.eval()
        with torch.no_grad():
            forward(built.engine, parts.backbone, batch.to(ranks.device))
        for module in training:
            module.training = True
    for parameter in built.trainables.values():
        engine_state.read_full(built.engine, parameter)


def go_and_come_back(
    stepper: Stepper, built: Built, parts: SimpleNamespace, batch: Any, folder: Path, ranks: processes.Ranks
) -> None:
    """Save, take one more step and evaluate, as a run does before it goes back to its best checkpoint, and load."""
    folder.mkdir(exist_ok=True)
    path = checkpoint.save(
        folder, built.engine, built.trainables, stepper.state, recipe={}, fingerprint=built.fingerprint, keep_last=1
    )
    stepper.train_step(Step(0, 99, [batch]), 0.0)
    task = parts.train[0].task
    present = stepper.agree([batch], task).present[0]
    look(built, parts, modality.complete(batch, present, parts.backbone, task), ranks)
    checkpoint.load(path, built.engine, built.trainables, built.fingerprint)


def gather_too_early(engine: Any) -> None:
    """In place of `stage3.gather_flat`: gathers while hpZ still keeps copies of the values before the step."""
    optimizer = engine.optimizer
    trained, optimizer.persistent_parameters = optimizer.persistent_parameters, []
    finish_step = optimizer._post_step

    def gather_and_finish(*args: Any, **kwargs: Any) -> None:
        trained[0].all_gather_coalesced(trained).wait()
        finish_step(*args, **kwargs)

    optimizer._post_step = gather_and_finish


def main() -> None:
    args = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if args[2:]:  # as if so many of the ranks shared a machine
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % int(args[2]))
        os.environ["LOCAL_WORLD_SIZE"] = args[2]
    given, out = json.loads(Path(args[0]).read_text()), Path(args[1])
    ranks = processes.start(threads=1)
    for case in given["cases"]:
        gather = gather_too_early if case.get("early") else stage3.gather_flat
        together = mock.patch.object(token_scores, "LOGITS", case.get("together", token_scores.LOGITS))
        with mock.patch.object(stage3, "gather_flat", gather), together:
            result = run_case(case, given["backbones"], out, ranks)
        if ranks.rank == 0:
            torch.save(result, out / f"{case['name']}.pt")
            print("case done", case["name"], flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
