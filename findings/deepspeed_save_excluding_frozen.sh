#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: saving with exclude_frozen_parameters still moves every frozen number over the network, twice.
#
# A good guess: save_16bit_model(..., exclude_frozen_parameters=True) gathers the trained parameters only.
# What happens: the file holds the trained ones only, but each frozen one is gathered on all ranks, and rank 0 then sends it
#   to the others again although nobody changed it. The time of a save of some kilobytes is that of the whole base.
# Source: deepspeed.runtime.engine.DeepSpeedEngine._zero3_consolidated_16bit_state_dict: GatheredParameters over all
#   parameters with modifier_rank=0, the exclusion is looked at inside.
# Who is hurt: adapters on large frozen models that are saved often.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import os, torch, deepspeed
import deepspeed.comm.comm as comm

deepspeed.init_distributed("gloo", verbose=False)
moved = {"gathered": 0, "broadcast": 0}
gather, broadcast = comm.cdb.all_gather_into_tensor, comm.cdb.broadcast

def counted_gather(output_tensor, *args, **kwargs):
    moved["gathered"] += output_tensor.nbytes
    return gather(output_tensor, *args, **kwargs)

def counted_broadcast(tensor, *args, **kwargs):
    moved["broadcast"] += tensor.nbytes
    return broadcast(tensor, *args, **kwargs)

comm.cdb.all_gather_into_tensor, comm.cdb.broadcast = counted_gather, counted_broadcast

config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}}
with deepspeed.zero.Init(config_dict_or_path=config):
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(10)], torch.nn.Linear(64, 2))
model[:10].requires_grad_(False)
trained = list(model[10].parameters())
engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config)
moved.update(gathered=0, broadcast=0)
engine.save_16bit_model("saved", "model.bin", exclude_frozen_parameters=True)
torch.distributed.barrier()
saved = sum(t.nbytes for t in torch.load("saved/model.bin", weights_only=True).values())
whole = 4 * sum(p.ds_numel for p in model.parameters())
print(f"bytes in the file {saved}, bytes of the model {whole}, moved for the save: {moved}")
assert saved == 520 and moved["gathered"] >= whole and moved["broadcast"] >= whole
PY
