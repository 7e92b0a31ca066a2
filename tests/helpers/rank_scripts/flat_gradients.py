"""Ranks of test_flat_gradients_ranks.py: gradients reduced as one tensor, and a step without DeepSpeed's timers and
profilers, beside DeepSpeed's own.

Every rank writes WORK/RANK.pt: for ZeRO-1 and 3, of `own` and `flat` the steps of `trained`; what `unreached` and
`skipped` saw; and `left over`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.engine.zero import gradients, lean, stage1, stage3_gradients
from mmpeft_ds.engine.zero import state as zero_state
from tests.helpers.rank_scripts import checkpoint
from tests.helpers.rank_scripts.checkpoint import batch, make

deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def steps(engine, micro: int) -> None:
    """Forward and backward of one step of `micro` micro-batches, other samples on every rank."""
    for i in range(micro):
        engine.set_gradient_accumulation_boundary(i + 1 == micro)
        x, y = batch(10 * dist.get_rank() + i)
        engine.backward(nn.functional.cross_entropy(engine(x), y))
        if i + 1 < micro:
            engine.step()


def trained(engine, trainables) -> list[dict]:
    """Three steps: this rank's gradients, the norm that clips, and the weights and the engine's counts after."""
    seen = []
    for micro in (1, 3, 2):
        steps(engine, micro)
        held = [(shard.start, shard.gradient.clone()) for shard in gradients.shards(engine)]
        norms = gradients.Norms(engine, {id(p): i % 2 for i, p in enumerate(trainables.values())}, 2).squared()
        dist.all_reduce(norms)
        engine.step()
        norm = float(engine.get_global_grad_norm())
        counts = engine.micro_steps, engine.global_steps, engine.global_samples, engine.was_step_applied()
        seen.append({"held": held, "norm": norm, "norms": norms, "weights": values(trainables), "counts": counts})
    return seen


def values(trainables) -> dict[str, torch.Tensor]:
    """Copies of all weights. Collective."""
    with gathered(list(trainables.values())):
        return {name: p.detach().clone() for name, p in trainables.items()}


def told(engine, trainables) -> tuple[float, float]:
    """The norm that DeepSpeed computes, and that by which it clips when it is told twice as much."""
    knowing = gradients.know_norm(engine)
    steps(engine, 1)
    engine.step()
    computed = float(engine.get_global_grad_norm())
    steps(engine, 1)
    with knowing(2 * computed):
        engine.step()
    return computed, float(engine.get_global_grad_norm())


def unreached(engine, trainables) -> dict[str, torch.Tensor]:
    """Whole averaged gradients where the head's bias is reached by rank 0 alone, and by no one the second time."""
    found, bias = [], trainables["head.bias"]
    for reached in (True, False):

        def loss(x, reached=reached):
            others = sum(p.sum() for name, p in trainables.items() if name != "head.bias")
            return others + (3 * bias.sum() if reached and dist.get_rank() == 0 else 0)

        engine.module.forward = loss
        with gathered(list(trainables.values())):
            engine.backward(engine(torch.zeros(1)))
        own = torch.zeros(zero_state.numel(bias))
        for shard in gradients.shards(engine):
            if shard.parameter is bias:
                own[shard.start : shard.start + len(shard.gradient)] = shard.gradient
        dist.all_reduce(own)
        found.append(own)
        gradients.discard(engine)
    return {"by rank 0": found[0], "by none": found[1]}


def left_over(engine, trainables, micro: int) -> float:
    """The largest gradient of the head's bias in a step whose first of `micro` micro-batches, or only one, does not
    reach it, after a step that did."""
    bias = trainables["head.bias"]
    for step in range(2):
        for i in range(micro):
            engine.set_gradient_accumulation_boundary(i + 1 == micro)
            reached = step == 0 or i > 0

            def loss(x, reached=reached):
                others = sum(p.sum() for name, p in trainables.items() if name != "head.bias")
                return others + (3 * bias.sum() if reached else 0)

            engine.module.forward = loss
            with gathered(list(trainables.values())):
                engine.backward(engine(torch.zeros(1)))
            if i + 1 < micro:
                engine.step()
        if step == 0:
            engine.step()
    found = [shard.gradient.abs() for shard in gradients.shards(engine) if shard.parameter is bias]
    largest = max((float(gradient.max()) for gradient in found if len(gradient)), default=0.0)
    dist.all_reduce(most := torch.tensor(largest), op=dist.ReduceOp.MAX)
    return most.item()


def kept_by_deepspeed(forgets: bool, offload: bool) -> list[float]:
    """`left_over` of a step of one and of two micro-batches at ZeRO-3 where DeepSpeed reduces gradients itself."""
    found = []
    for micro in (1, 2):
        given = checkpoint.config

        def config(stage: int, bf16: bool, given=given) -> dict:
            made = given(stage, bf16) | ({"zero_force_ds_cpu_optimizer": False} if offload else {})
            made["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}} if offload else {}
            return made

        with mock.patch.object(lean, "step_directly"), mock.patch.object(checkpoint, "config", config):
            engine, trainables = make(3)
        if forgets:
            stage3_gradients.forget_each_step(engine)
        found.append(left_over(engine, trainables, micro))
    return found


def skipped(engine, trainables) -> bool:
    """Whether a step that all ranks skip leaves the weights, and the next one applies."""
    before = values(trainables)
    steps(engine, 1)
    gradients.discard(engine)
    left = all(torch.equal(before[name], p) for name, p in values(trainables).items())
    steps(engine, 1)
    engine.step()
    return left and not any(torch.equal(before[name], p) for name, p in values(trainables).items())


def released(engine, trainables) -> bool:
    """Whether a pass gives the same gradients after someone has released those of the parameters."""
    found = []
    for _ in range(2):
        steps(engine, 1)
        found.append([shard.gradient.clone() for shard in gradients.shards(engine)])
        gradients.discard(engine)
        for parameter in trainables.values():
            parameter.grad = None
    return all(map(torch.equal, *found)) and any(gradient.any() for gradient in found[0])


def flat(stage: int):
    """Engine and trainables as the trainer builds them."""
    engine, trainables = make(stage)
    if stage == 3:
        assert stage3_gradients.reduce_flat(engine)
    return engine, trainables


work = Path(sys.argv[1])
result = {}
for stage in (1, 3):
    with (
        mock.patch.object(stage1, "reduce_flat", lambda engine: True),
        mock.patch.object(lean, "step_directly"),
    ):
        own = make(stage)
    result[stage] = {"own": trained(*own), "flat": trained(*flat(stage)), "told": told(*flat(stage))}
    result[stage] |= {"unreached": unreached(*flat(stage)), "skipped": skipped(*flat(stage))}
    result[stage] |= {"released": released(*flat(stage))}
result["left over"] = {
    (forgets, offload): kept_by_deepspeed(forgets, offload) for forgets in (False, True) for offload in (False, True)
}
torch.save(result, work / f"{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
