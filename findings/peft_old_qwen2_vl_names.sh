#!/usr/bin/env bash
# peft on Qwen2-VL: an adapter saved before transformers 4.52 loads with a warning and none of its weights.
#
# A good guess: old adapters either load, since peft maps their names as transformers maps those of old checkpoints, or fail.
# What happens: modules moved in transformers 4.52 (model.layers is model.language_model.layers now). peft translates the names of
#   LLaVA's adapters, but looks the table up by `model_type`; Qwen2-VL's stands there under the name of its class, so nothing
#   is translated, every tensor is ignored, and the fresh random ones answer.
# Source: peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers;
#   transformers.conversion_mapping ("Qwen2VLForConditionalGeneration").
# Who is hurt: whoever evaluates, merges or goes on training an adapter from 2024 and early 2025.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import copy, warnings
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2VLConfig, Qwen2VLForConditionalGeneration

small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
text = dict(vocab_size=50, num_key_value_heads=2, **small)
vision = dict(model_type="clip_vision_model", image_size=32, patch_size=16, **small)
rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=dict(model_type="llama", **text), image_token_id=40))
qwen = Qwen2VLForConditionalGeneration(Qwen2VLConfig(
    text_config=dict(rope_parameters=rope, **text), vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2)))
lost = {}
for base, then in ((llava, "language_model.model.layers"), (qwen, "model.layers")):
    name = type(base).__name__
    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    get_peft_model(copy.deepcopy(base), config).save_pretrained(name)
    right = load_file(f"{name}/adapter_model.safetensors")
    save_file({k.replace("model.language_model.layers", then): v for k, v in right.items()}, f"{name}/adapter_model.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), name).state_dict()
    kept = [torch.equal(loaded[k.replace(".weight", ".default.weight")], v) for k, v in right.items()]
    lost[name] = kept.count(False)
    print(f"{name}: {kept.count(True)} of {len(kept)} tensors are those of the file; warned: "
          f"{any('Found missing adapter keys' in str(w.message) for w in said)}")
assert lost == {"LlavaForConditionalGeneration": 0, "Qwen2VLForConditionalGeneration": 2}, lost
PY
