#!/usr/bin/env bash
# DeepSpeed: the loader that deepspeed.initialize(training_data=...) returns shuffles once; every epoch has the same order.
#
# A good guess: a loader that shuffles draws a new order in each epoch, as torch's DataLoader(shuffle=True) does.
# What happens: the loader makes a DistributedSampler, whose order is a function of its seed and of set_epoch, and nothing calls
#   set_epoch; the loader has no such method itself. Batches of every epoch hold the same samples. RepeatingLoader, which is made for
#   many epochs, repeats them too. loader.data_sampler.set_epoch(n) before each epoch helps.
# Source: deepspeed.runtime.dataloader.DeepSpeedDataLoader and RepeatingLoader.
# Who is hurt: contrastive losses and graphs over a batch, which meet the same neighbours for ever; any run of several epochs.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed
from deepspeed.runtime.dataloader import RepeatingLoader

deepspeed.init_distributed("gloo", verbose=False)
samples = torch.utils.data.TensorDataset(torch.arange(64)[:, None].float())
_, _, loader, _ = deepspeed.initialize(
    model=torch.nn.Linear(1, 1), training_data=samples,
    config={"train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 1}})

def order(batches):
    return [int(value) for batch in batches for value in batch[0].flatten()]

first, second = order(loader), order(loader)
repeating = iter(RepeatingLoader(loader))
endless = order(next(repeating) for _ in range(24))
plain = torch.utils.data.DataLoader(samples, batch_size=8, shuffle=True)
loader.data_sampler.set_epoch(1)
print("first samples of two epochs:", first[:6], second[:6])
print("the same order in all epochs:", first == second == endless[:64] == endless[64:128] == endless[128:])
print("with set_epoch by hand:", order(loader)[:6])
assert sorted(first) == list(range(64)) and first != sorted(first)
assert first == second == endless[:64] == endless[64:128] == endless[128:]
assert order(loader) != first and order(plain) != order(plain)
PY
