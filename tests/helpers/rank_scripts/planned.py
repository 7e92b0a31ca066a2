"""Ranks of test_plan_ranks.py: trains a tiny LLaVA, or a head on features, under several configurations and counts
what really happens.

    python -m tests.helpers.rank_scripts.planned CASES.json FOLDER      (one process per rank)

Each case is {name, zero, accumulation, recompute, dtype, row}, {name, zero, head} with options of GA-Net, or
{name, zero, hegraph} with those of HeGraph. Rank 0 writes FOLDER/NAME.json. The memory is that of the step
that needed least, since of some tensors the profiler does not see the end.
"""

import dataclasses
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.bad_budget import BadBudget
from mmpeft_ds.data.batch import PackedBatch
from mmpeft_ds.data.stream import Step
from mmpeft_ds.distributed import processes
from mmpeft_ds.engine.assembly import feature_bank
from mmpeft_ds.engine.assembly import resolve as resolving
from mmpeft_ds.engine.assembly.build import build
from mmpeft_ds.engine.step import Stepper
from mmpeft_ds.engine.train_state import TrainState
from mmpeft_ds.engine.zero.config import check_ds_config
from mmpeft_ds.planning import microbatch
from mmpeft_ds.tasks.instruction.task import Instruction, Options
from tests.helpers import allocations, traffic
from tests.helpers.rank_scripts import ga_net, hegraph
from tests.helpers.runs import tiny_classifier

WARM, MEASURED = 4, 5  # steps; DeepSpeed knows the order of the modules after two
WORDS, SAMPLES = 24, 2  # of the samples of a micro-batch
ROWS, WIDTH, CLASSES = 64, 96, 20  # of the features of a head: samples, of each modality, classes
TEXTS, SHOTS = 2, 16  # of each class in the bank of HeGraph


def make_recipe(folder: Path, case: dict) -> recipes.Recipe:
    recipe = recipes.Recipe(
        run_dir=str(folder / "run"),
        backbone={"name": "mllm", "model": str(folder / "llava")},
        method={"name": "lora", "r": case.get("r", 4), "target_modules": r".*language_model.*_proj"},
    )
    recipe.engine.deepspeed = write_config(folder, case)
    recipe.engine.gradient_checkpointing = case.get("recompute", False)
    recipe.engine.dtype = case.get("dtype", "float32")
    recipe.optim.accumulation = case.get("accumulation", 1)
    recipe.optim.max_steps = 10
    recipe.data.global_batch = 16
    if case.get("row"):  # one micro-batch of a full row
        recipe.data.pack, recipe.data.global_batch = case["row"], SAMPLES
    return recipe


def write_config(folder: Path, case: dict) -> str:
    """The case's DeepSpeed file, which every rank writes and reads at its own time."""
    path, own = folder / f"{case['name']}.ds.json", folder / f"{case['name']}.{os.getpid()}"
    own.write_text(json.dumps({"zero_optimization": case["zero"]}))
    own.replace(path)
    return str(path)


def head_of(folder: Path, case: dict):
    """A resolved recipe of GA-Net on features, without a data set."""
    with mock.patch.multiple(ga_net, WIDTH=WIDTH, CLASSES=CLASSES, TOWERS=ga_net.TOWERS | {
        "image_width": WIDTH, "text_width": WIDTH
    }):  # fmt: skip
        made = ga_net.resolved({"stage": case["zero"]["stage"], "options": case["head"], "steps": 10}, folder)
    return configured(dataclasses.replace(made, validation=[]), folder, case)


def hegraph_of(folder: Path, case: dict):
    """A resolved recipe of HeGraph on features, without a data set."""
    towers = hegraph.TOWERS | {"image_width": WIDTH, "text_width": WIDTH}
    with (
        mock.patch.multiple(hegraph, WIDTH=WIDTH, CLASSES=CLASSES, TOWERS=towers, STEPS=10, bank=bank),
        mock.patch.object(feature_bank, "read"),
    ):
        made = hegraph.resolved(case["hegraph"].get("shard", "none"), folder)
    made.backbone.use_bank(bank())
    made.recipe.method |= case["hegraph"]
    method, config = resolving.make_method(recipes.components(made.recipe).method)
    return configured(dataclasses.replace(made, validation=[], method=method, method_config=config), folder, case)


def configured(resolved, folder: Path, case: dict):
    """With the case's `zero_optimization`, which the plan gets too."""
    recipe = resolved.recipe
    recipe.engine.deepspeed = write_config(folder, case)
    return dataclasses.replace(resolved, ds_config=check_ds_config(recipe))


def bank() -> dict[str, torch.Tensor]:
    """Texts of the classes, and a support set, for HeGraph."""
    draw = torch.Generator().manual_seed(1)
    texts = torch.randn(2, CLASSES, TEXTS, WIDTH, generator=draw)
    support = torch.randn(CLASSES * SHOTS, 1, WIDTH, generator=draw)
    labels = torch.arange(CLASSES).repeat_interleave(SHOTS)
    return {"positive": texts[0], "negative": texts[1], "support": support, "support_labels": labels}


def with_features(batch: PackedBatch, alike: bool, rank: int) -> PackedBatch:
    """The batch with features: the same for all samples, so that each is a neighbour of each, or of a rank's own."""
    draw = torch.Generator().manual_seed(rank)

    def filled(tensors: dict) -> dict:
        return {
            n: (torch.ones_like(t) if alike else torch.randn(t.shape, generator=draw)) if t.is_floating_point() else t
            for n, t in tensors.items()
        }

    return dataclasses.replace(batch, images=filled(batch.images), texts=filled(batch.texts), counts=None)


def resolved_of(folder: Path, case: dict):
    if "head" in case:
        return head_of(folder, case)
    if "hegraph" in case:
        return hegraph_of(folder, case)
    return tiny_classifier.make_resolved(make_recipe(folder, case), Instruction(Options(max_new_tokens=0), None))


def size(case: dict) -> microbatch.Size:
    """Of a micro-batch of a case."""
    if "head" in case or "hegraph" in case:
        return microbatch.Size(ROWS)
    return microbatch.Size(SAMPLES, case.get("row", 0))


def run_case(case: dict, folder: Path, ranks: processes.Ranks) -> dict:
    resolved = resolved_of(folder, case)
    before = allocations.live_bytes()
    if "hegraph" in case:
        before -= sum(tensor.nbytes for tensor in bank().values())  # of the plan, which that of the run replaces
    with mock.patch.object(feature_bank, "read", lambda *_: bank()) if "hegraph" in case else nullcontext():
        built = build(resolved, ranks)
    stepper = Stepper(resolved, built, ranks, 10, TrainState(), BadBudget(1.0, 1000))
    filling = microbatch.Filling(words=WORDS)
    batch = microbatch.fill(resolved.backbone, resolved.train[0].task, size(case), filling)
    if "head" in case or "hegraph" in case:
        alike = "head" in case and case["head"].get("graph", "threshold") == "threshold"
        batch = with_features(batch, alike, ranks.rank)
    micro = [batch] * resolved.recipe.optim.accumulation
    for step in range(WARM):
        stepper.train_step(Step(0, step, micro), 0.0)
    with traffic.counted() as found, allocations.recorded() as allocated:
        held = []
        for step in range(MEASURED):
            held.append(allocations.live_bytes() - before)
            allocated.mark()
            stepper.train_step(Step(0, WARM + step, micro), 0.0)
    built.engine.destroy()
    del built, stepper
    received = {str(n): {kind: size / MEASURED for kind, size in kinds.items()} for n, kinds in found.items()}
    calls = {n: kinds.pop(traffic.CALLS) for n, kinds in received.items()}
    memory = min(before + more for before, more in zip(held, allocated.growth, strict=True))
    return {"received": received, "calls": calls, "memory": memory}


def main() -> None:
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    traffic.install()
    ranks = processes.start(threads=1)
    for case in cases:
        found = run_case(case, folder, ranks)
        if ranks.rank == 0:
            (folder / f"{case['name']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
