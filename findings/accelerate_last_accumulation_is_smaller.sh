#!/usr/bin/env bash
# accelerate: where an epoch's batches do not divide by the accumulation steps, its last step is a fraction of the others.
#
# A good guess: the batches left over at the end of the loader make a step of their own, whose gradient is their mean.
# What happens: backward() divides every loss by gradient_accumulation_steps, also where the loader ends before so many batches
#   came. With 4 steps and one batch left, that step is a quarter of the size; Adam takes the small gradient into its moments as
#   if the loss were flat there.
# Source: accelerate.Accelerator.backward (loss / gradient_accumulation_steps) with _do_sync (sync_with_dataloader=True).
# Who is hurt: short epochs and long accumulations, and comparisons with transformers' Trainer, which divides by the batches it has.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 accelerate==1.15.0

observe <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

def steps(batches):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = torch.nn.Linear(1, 1, bias=False)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1.0), DataLoader([torch.ones(1)] * batches, batch_size=1))
    lengths = []
    for batch in loader:
        with accelerator.accumulate(model):
            before = model.weight.item()
            accelerator.backward(model(batch).mean())
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                lengths.append(round(before - model.weight.item(), 3))
    return lengths

for batches, expected in ((8, [1.0, 1.0]), (9, [1.0, 1.0, 0.25]), (2, [0.5])):
    seen = steps(batches)
    print(f"{batches} batches, each with a gradient of 1, 4 accumulation steps: lengths of the steps of SGD(lr=1) {seen}")
    assert seen == expected
PY
