#!/usr/bin/env bash
# peft: save_pretrained(state_dict=...) with names that lack "base_model.model." writes an adapter file without a single tensor.
#
# A good guess: a state dict whose names peft does not know is refused, or saved as it is.
# What happens: entries without the wrapper's prefix are of no use to the selection by "lora_" and the adapter's name, so nothing is kept:
#   no error, no warning, adapter_config.json is right and adapter_model.safetensors holds no tensor. Loading it warns of missing keys and
#   gives a model with a fresh adapter, that is the base.
# Source: peft.PeftModel.save_pretrained, peft.utils.save_and_load.get_peft_model_state_dict.
# Who is hurt: scripts that gather weights themselves (ZeRO-3, FSDP) from the inner model and hand them over: the run ends well and its
#   result is gone.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2

observe <<'PY'
import warnings
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

base = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=32))
model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))

def saved(folder, module):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.save_pretrained(folder, state_dict=module.state_dict())
    print(f"{folder}: {len(load_file(f'{folder}/adapter_model.safetensors'))} tensors,",
          len([w for w in told if "adapter" in str(w.message).lower()]), "warnings of adapters")
    return load_file(f"{folder}/adapter_model.safetensors")

assert len(saved("of_the_wrapper", model)) == 2
assert len(saved("of_the_inner_model", model.get_base_model())) == 0
PY
