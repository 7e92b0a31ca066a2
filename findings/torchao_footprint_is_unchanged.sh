#!/usr/bin/env bash
# torchao with transformers: a model in 8 bits reports the memory footprint that it had in float32 or bfloat16.
#
# A good guess: get_memory_footprint(), nbytes and untyped_storage().nbytes() of int8 weights give about a quarter of the float32 bytes.
# What happens: the quantised weight calls itself a tensor of the original dtype and size, its codes and scales are tensors inside it, and
#   all three give the bytes of the original; the same weights in bitsandbytes' form are counted as stored.
# Source: transformers.PreTrainedModel.get_memory_footprint (nelement * element_size), torchao's Int8Tensor and Float8Tensor
#   (wrapper subclasses made with the original dtype).
# Who is hurt: tables of memory by method, planners that decide by it whether a base fits, and comparisons of torchao with bitsandbytes.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 torchao==0.18.0

observe <<'PY' 2> >(grep -v -e _C_ -e register_constant >&2)
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=32)

def stored(tensor):
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(stored(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])

for how in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
    model = LlamaForCausalLM(config)
    before = model.get_memory_footprint()
    quantize_(model.model, how)
    weight = model.model.layers[0].mlp.up_proj.weight
    held = sum(stored(p.data) for p in model.parameters())
    print(f"{type(weight.data).__name__}: get_memory_footprint {before} before, {model.get_memory_footprint()} after, held {held}; "
          f"one weight: nbytes {weight.nbytes}, storage {weight.untyped_storage().nbytes()}, held {stored(weight.data)}")
    assert type(weight.data) is not torch.Tensor and model.get_memory_footprint() == before and held < 0.4 * before
    assert weight.nbytes == weight.untyped_storage().nbytes() == 4 * 64 * 256 and stored(weight.data) < 1.2 * 64 * 256
PY
