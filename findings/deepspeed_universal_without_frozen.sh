#!/usr/bin/env bash
# DeepSpeed: loading a universal checkpoint restores what is trained, and neither frozen parameters nor buffers.
#
# A good guess: load_checkpoint with "load_universal" gives the model back that was saved, as it does without, on any number of ranks.
# What happens: only parameters that the optimizer holds are read. Frozen weights and buffers (a BatchNorm's statistics, a memory bank)
#   keep the values that the new process made; nothing is said, the path is returned and the step counter is set. The converter has
#   written the frozen ones and the buffers at stages 1 and 2 (zero/NAME/fp32.pt) but nothing reads them; at stage 3 it leaves them out.
# Source: deepspeed.runtime.engine.DeepSpeedEngine._load_checkpoint (load_module_state_dict is called only if not
#   load_universal_checkpoint()).
# Who is hurt: adapters over a base that was not loaded from elsewhere first, parts that were frozen late, anything with buffers:
#   training goes on over random weights after a change of the rank count.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import os, subprocess, sys
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)


def engine(stage, seed, universal=False):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": universal}}
    return deepspeed.initialize(model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained, 0.1), config=config)[0]


def numbers(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        named = [*engine.module.named_parameters(), *engine.module.named_buffers()]
        return {name: tensor.detach().clone() for name, tensor in named}


def restored(stage, tag):
    loaded = engine(stage, seed=1, universal=tag == "universal")
    assert loaded.load_checkpoint(f"saved{stage}", tag=tag)[0] and loaded.global_steps == 3
    now = numbers(loaded)
    return sorted(name for name in saved if torch.equal(saved[name], now[name]))


trained = ["1.bias", "1.weight", "2.bias", "2.weight"]
for stage in (1, 2, 3):
    first = engine(stage, seed=0)
    for _ in range(3):
        first.backward(first(torch.randn(8, 4)).square().sum())
        first.step()
    saved = numbers(first)
    first.save_checkpoint(f"saved{stage}", tag="plain")
    subprocess.run([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", f"saved{stage}/plain",
                    "--output_folder", f"saved{stage}/universal", "--num_extract_workers", "1", "--num_merge_workers", "1",
                    "--inject_missing_state"], check=True, capture_output=True)
    written = os.path.isdir(f"saved{stage}/universal/zero/0.weight")
    plain, universal = restored(stage, "plain"), restored(stage, "universal")
    print(f"stage {stage}: restored of {len(saved)} tensors: {len(plain)} from the checkpoint, {len(universal)} from the universal one "
          f"({', '.join(universal)}); the frozen weight stands in the universal folder: {written}")
    assert plain == sorted(saved) and universal == trained and written == (stage < 3)
PY
