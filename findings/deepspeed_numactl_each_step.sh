#!/usr/bin/env bash
# DeepSpeed, ZeRO 3 on CPUs: under torchrun every optimizer step starts the program numactl.
#
# A good guess: the number of devices of a machine is looked up once, when the accelerator is chosen; a training step starts
#   no process.
# What happens: reducing gradients asks the accelerator for its number of devices. On CPUs it is LOCAL_SIZE, which the deepspeed
#   launcher sets and torchrun and srun do not; without it `numactl --hardware` is run, each time again, whether installed or not.
# Source: deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.__avg_scatter_grads (`device_count`),
#   deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.device_count, deepspeed.utils.numa.get_numa_cores.
# Who is hurt: ranks on CPUs started by torchrun or srun: each forks in every step, at millions of pages some milliseconds each time.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import os, sys, torch, deepspeed

started = []
sys.addaudithook(lambda event, args: started.append(args[1][0]) if event == "subprocess.Popen" else None)
deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Linear(8, 8)
config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)

def programs_of(steps):
    started.clear()
    for _ in range(steps):
        engine.backward(engine(torch.ones(2, 8)).sum())
        engine.step()
    return list(started)

programs_of(1)  # what the first step does besides
with_local_size = programs_of(3)
del os.environ["LOCAL_SIZE"]  # as torchrun and srun leave it
without = programs_of(3)
print(f"started in 3 steps with LOCAL_SIZE: {with_local_size}; without: {without}")
assert with_local_size == [] and without == ["numactl"] * 3
PY
