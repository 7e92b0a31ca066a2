#!/usr/bin/env bash
# peft with DeepSpeed ZeRO 3: save_pretrained writes empty tensors, and small models hide it.
#
# A good guess: engine.module.save_pretrained(folder) saves the adapter, gathers it, or fails.
# What happens: split parameters have shape [0] between steps, and are written so without a word; the error comes when the
#   adapter is loaded, after the training. Parameters below the persistence threshold are whole after the first step, so that
#   with the default threshold a small test saves all it should, and a large head or high rank does not. Under
#   deepspeed.zero.GatheredParameters, entered by all ranks, all is saved.
# Source: peft.PeftModel.save_pretrained and get_peft_model_state_dict, on module.state_dict() of a partitioned module.
# Who is hurt: loops of their own around DeepSpeed; transformers' Trainer gathers before it saves.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8 peft==0.21.2 transformers==5.23.0

in_ranks 2 <<'PY'
import torch, deepspeed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

deepspeed.init_distributed("gloo", verbose=False)

def saved_shapes(threshold, gather=False):
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {
        "stage": 3, **({} if threshold is None else {"stage3_param_persistence_threshold": threshold})}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        base = torch.nn.Sequential(torch.nn.Linear(6, 6))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config)
    for _ in range(2):
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        engine.step()
    folder = f"rank{deepspeed.comm.get_rank()}_{threshold}_{gather}"
    with deepspeed.zero.GatheredParameters(trained, enabled=gather):
        engine.module.save_pretrained(folder)
    return sorted(tuple(t.shape) for t in load_file(f"{folder}/adapter_model.safetensors").values())

whole, split, gathered = saved_shapes(None), saved_shapes(0), saved_shapes(0, gather=True)
print("shapes of lora_A and lora_B in the saved file, default persistence threshold:", whole, "threshold 0:", split)
print("threshold 0, gathered:", gathered)
assert whole == gathered == [(2, 6), (6, 2)] and split == [(0,), (0,)]
PY
