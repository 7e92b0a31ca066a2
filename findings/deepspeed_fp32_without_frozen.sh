#!/usr/bin/env bash
# DeepSpeed, ZeRO 1: the float32 weights taken out of a checkpoint lack every frozen parameter, at ZeRO 2 and 3 they have them.
#
# A good guess: zero_to_fp32 (get_fp32_state_dict_from_zero_checkpoint) gives the whole model unless frozen parameters are to be left out.
# What happens: at stage 1 the frozen ones are missing although they were saved (the model's file of the same checkpoint has them) and
#   nobody asked for that; nothing is said. With load_state_dict(strict=False), as adapters are loaded, the frozen part stays what it was.
# Source: deepspeed.runtime.engine.DeepSpeedEngine._save_checkpoint: the list of frozen parameters is written only where
#   zero_optimization_partition_gradients(), which is stage 2 and higher.
# Who is hurt: adapters, prompts and heads over a frozen base at stage 1: the converted file is no model, and a base that was frozen late
#   in training or loaded from another file is lost.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import contextlib, io
import torch, deepspeed
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

deepspeed.init_distributed("gloo", verbose=False)
found = {}
for stage in (1, 2, 3):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    trained = list(model[1].parameters())
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, optimizer=torch.optim.AdamW(trained), config=config)
    engine.backward(engine(torch.randn(2, 4)).sum())
    engine.step()
    engine.save_checkpoint(f"saved{stage}", tag="one")
    with contextlib.redirect_stdout(io.StringIO()):
        found[stage] = sorted(get_fp32_state_dict_from_zero_checkpoint(f"saved{stage}"))
    print(f"stage {stage}: {found[stage]}")
whole = ["0.bias", "0.weight", "1.bias", "1.weight"]
in_file = torch.load("saved1/one/mp_rank_00_model_states.pt", weights_only=False)["module"]
assert sorted(in_file) == whole
assert found == {1: ["1.bias", "1.weight"], 2: whole, 3: whole}
PY
