"""Ranks of test_zero1_ranks.py: gradients reduced as one tensor beside DeepSpeed's own ZeRO-1.

Every rank writes WORK/RANK.pt: of `own` and `flat`, the steps of `trained`; and what `unreached` and `skipped` saw.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from mmpeft_ds.engine.zero import gradients, stage1
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
    """Three steps: this rank's gradients, the norm that clips, and the weights after."""
    seen = []
    for micro in (1, 3, 2):
        steps(engine, micro)
        held = [(shard.start, shard.gradient.clone()) for shard in gradients.shards(engine)]
        engine.step()
        weights = {name: p.detach().clone() for name, p in trainables.items()}
        seen.append({"held": held, "norm": float(engine.get_global_grad_norm()), "weights": weights})
    return seen


def unreached(engine, trainables) -> dict[str, torch.Tensor]:
    """Whole averaged gradients where the head's bias is reached by rank 0 alone, and by no one the second time."""
    found, bias = [], trainables["head.bias"]
    others = sum(p.sum() for name, p in trainables.items() if name != "head.bias")
    for reached in (True, False):
        mine = 3 * bias.sum() if reached and dist.get_rank() == 0 else 0
        engine.module.forward = lambda x, loss=others + mine: loss
        engine.backward(engine(torch.zeros(1)), retain_graph=True)
        own = torch.zeros(bias.numel())
        for shard in gradients.shards(engine):
            if shard.parameter is bias:
                own[shard.start : shard.start + len(shard.gradient)] = shard.gradient
        dist.all_reduce(own)
        found.append(own)
        gradients.discard(engine)
    return {"by rank 0": found[0], "by none": found[1]}


def skipped(engine, trainables) -> bool:
    """Whether a step that all ranks skip leaves the weights, and the next one applies."""
    before = {name: p.detach().clone() for name, p in trainables.items()}
    steps(engine, 1)
    gradients.discard(engine)
    left = all(torch.equal(before[name], p) for name, p in trainables.items())
    steps(engine, 1)
    engine.step()
    return left and not any(torch.equal(before[name], p) for name, p in trainables.items())


work = Path(sys.argv[1])
with mock.patch.object(stage1, "reduce_flat", lambda engine: True):
    own = make(1)
result = {"own": trained(*own), "flat": trained(*make(1))}
result |= {"unreached": unreached(*make(1)), "skipped": skipped(*make(1))}
torch.save(result, work / f"{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
