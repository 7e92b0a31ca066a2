#!/usr/bin/env bash
# DeepSpeed: whether bf16.enabled casts float32 adapters to bfloat16 depends on the stage and on how the base was built.
#
# A good guess: "bf16.enabled" is either mixed precision that keeps trainable float32 weights as they are, or a cast of the
#   whole model; in both cases the same at every stage.
# What happens: stages 0, 1, 2, and 3 with a base built outside zero.Init: every parameter becomes bfloat16, also the
#   adapter that was float32 on purpose. Stage 3 with a base built inside zero.Init: nothing is cast, the adapter stays float32.
# Source: deepspeed.runtime.engine.DeepSpeedEngine._configure_distributed_model: module.bfloat16() unless one parameter
#   is already partitioned.
# Who is hurt: parameter-efficient tuning: small updates of bfloat16 adapters are rounded away, the same recipe trains other
#   numbers at stages 2 and 3, and "adapters stay float32" checked at one stage does not hold at another.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import contextlib, torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)

def adapter_dtype(stage, inside_zero_init):
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    with deepspeed.zero.Init(config_dict_or_path=config) if inside_zero_init else contextlib.nullcontext():
        base = torch.nn.Linear(6, 6, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"base": base.requires_grad_(False), "adapter": torch.nn.Linear(6, 6)})
    trained = list(model["adapter"].parameters())
    deepspeed.initialize(model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config)
    return model["adapter"].weight.dtype

seen = {(stage, inside): adapter_dtype(stage, inside) for stage, inside in
        ((0, False), (1, False), (2, False), (3, False), (3, True))}
for (stage, inside), dtype in seen.items():
    print(f"stage {stage}, base built {'inside' if inside else 'outside'} zero.Init: the float32 adapter is now {dtype}")
assert all(dtype == (torch.float32 if inside else torch.bfloat16) for (_, inside), dtype in seen.items())
PY
